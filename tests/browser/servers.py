"""JupyterLab and Voilà, started on a notebook with the studio in it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

# JupyterLab can run cells
READY = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady"
ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / ".venv-widgets7"  # ipywidgets as Google Colab has it
OLD_PACKAGES = (
    "ipywidgets==7.7.1",
    "jupyterlab_widgets<2",
    "widgetsnbextension<4",
    "notebook<7",
    "jupyterlab<4",
    "voila==0.5.13",
)
CELLS = (
    "import lorabook as lb\n"
    "pipe = lb.load_pipeline('tiny-sd', device='cpu')\n"
    "for name in {adapters!r}:\n"
    "    lb.load_adapter(pipe, name)",
    "studio = lb.ScaleStudio(pipe, prompt={prompt!r}, num_inference_steps={steps})\nstudio",
)


def lacking(what: str) -> None:
    """Skip; or fail where CI is set, where nothing may be left out."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def chromium() -> str:
    """The path of a Chromium."""
    found = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    return found or lacking("there is no Chromium: apt-get install chromium")


def write_notebook(folder: Path, prompt: str, steps: int, adapters=("ink", "creatures")) -> Path:
    """A notebook that shows a studio."""
    cells = [
        nbformat.v4.new_code_cell(source.format(prompt=prompt, steps=steps, adapters=adapters))
        for source in CELLS
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "studio.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def old_python() -> Path:
    """Python with ipywidgets 7.7.1 before all else, and the packages of this environment behind;
    made when first asked for.

    Raises: subprocess.CalledProcessError where the packages cannot be fetched.
    """
    python, ready = OLD / "bin" / "python", OLD / "ready"
    if not ready.is_file() or ready.read_text() != " ".join(OLD_PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", OLD], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *OLD_PACKAGES],
            check=True,
            timeout=600,
            capture_output=True,
        )
        own = next((OLD / "lib").glob("python3*/site-packages"))
        behind = [path for path in sys.path if path.endswith("site-packages")]
        (own / "zz_behind.pth").write_text("\n".join([*behind, str(ROOT)]) + "\n")
        (OLD / ".gitignore").write_text("*\n")
        ready.write_text(" ".join(OLD_PACKAGES))
    return python


@contextmanager
def serving(kind: str, notebook: Path, python: Path | str = sys.executable):
    """ "lab" or "voila" on a notebook; gives the address to open."""
    port = _free_port()
    news = (
        notebook.parent
        / "settings"
        / "@jupyterlab"
        / "apputils-extension"
        / "notification.jupyterlab-settings"
    )
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    settings = str(notebook.parent / "settings")
    arguments = {
        "lab": [
            "jupyterlab",
            "--allow-root",
            "--ip=127.0.0.1",
            "--IdentityProvider.token=t",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={notebook.parent}",
            "--LabApp.expose_app_in_browser=True",
        ],
        "voila": ["voila", str(notebook), "--Voila.ip=127.0.0.1"],
    }[kind]
    log = open(notebook.parent / f"{kind}.log", "w")  # noqa: SIM115
    server = subprocess.Popen(
        [str(python), "-m", *arguments, "--no-browser", f"--port={port}"],
        cwd=notebook.parent,
        start_new_session=True,
        env=os.environ
        | {
            "JUPYTERLAB_SETTINGS_DIR": settings,
            "JUPYTERLAB_WORKSPACES_DIR": settings,
            "JUPYTER_PREFER_ENV_PATH": "1",
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_for(port, server, Path(log.name))
        yield f"http://127.0.0.1:{port}/" + (
            f"doc/tree/{notebook.name}?token=t" if kind == "lab" else ""
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
        log.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(480):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, f"the server ended:\n{log.read_text()[-2000:]}"
        time.sleep(0.25)
    raise AssertionError(f"the server did not answer:\n{log.read_text()[-2000:]}")
