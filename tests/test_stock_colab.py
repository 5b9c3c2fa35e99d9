"""Colab's stock versions, as far as wheels for this Python exist: before the setup cell no LoRA, after it notebook 00."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from badges import repository

ROOT = Path(__file__).parent.parent
STOCK = ("torchao==0.10.0", "diffusers==0.39.0", "peft==0.20.0", "transformers==5.15.0", "huggingface_hub==1.27",
         "datasets==4.0.0", "ipywidgets==7.7.1")
SETUP = (ROOT / "tests/notebooks/setup_cell.py").read_text()
UNET = str(ROOT / "data/tiny-sd/unet")
ADD = (f"import diffusers, peft; unet = diffusers.UNet2DConditionModel.from_pretrained({UNET!r}); "
       "unet.add_adapter(peft.LoraConfig(target_modules=['to_q']))")


def run(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)


def versions(python) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format=json").stdout)
    return {each["name"].lower().replace("_", "-"): each["version"] for each in reversed(listed)}


def in_trouble(python) -> set[str]:
    """What the doctor of an environment finds wrong."""
    told = json.loads(run(python, "-m", "lorabook", "doctor", "--json", cwd=ROOT).stdout)
    return {check["name"] for check in told["checks"] if check["verdict"] == "trouble"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The Python of an environment with Colab's versions; what they leave open comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("stock")
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    installed = run(python, "-m", "pip", "install", "-q", "--no-compile", *STOCK)
    if installed.returncode:
        pytest.skip(f"no wheels of Colab's versions here: {installed.stderr[-200:]}")
    yield python
    shutil.rmtree(folder)


@pytest.fixture
def book(tmp_path):
    """A repository with the work tree's package and data, to which git is led where the setup cell asks for the real one."""
    source = tmp_path / "source"
    for name in ("lorabook", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "make"))
    shutil.copy(ROOT / "pyproject.toml", source)
    git = ("git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@example.org")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "book")):
        run(*git, *arguments, check=True)
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
            "GIT_CONFIG_VALUE_0": repository(), "COLAB_RELEASE_TAG": "a stand-in"}


def test_stock_colab_cannot_make_a_lora_until_the_setup_cell_has_run(stock, book, tmp_path, monkeypatch):
    refused = run(stock, "-c", ADD)
    assert refused.returncode and "incompatible version of torchao" in refused.stderr
    assert in_trouble(stock) == {"diffusers", "torchao", "a LoRA by peft"}
    before = versions(stock)
    kernel = tmp_path / "jupyter/kernels/stock/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": [str(stock), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                  "display_name": "stock", "language": "python",
                                  "env": book | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}}))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code" and "git clone" in cell.source)
    setup.source = SETUP.replace("/tmp/lorabook-book", str(tmp_path / "book"))
    (tmp_path / "content").mkdir()
    NotebookClient(notebook, timeout=300, kernel_name="stock",
                   resources={"metadata": {"path": str(tmp_path / "content")}}).execute()
    after = versions(stock)
    assert "".join(output.text for output in setup.outputs).startswith("lorabook: installed diffusers")
    assert {name for name in before if before[name] != after.get(name)} == {"diffusers", "huggingface-hub", "torchao"}
    assert run(stock, "-c", ADD).returncode == 0 and not in_trouble(stock)
