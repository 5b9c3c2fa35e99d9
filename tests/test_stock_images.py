"""The stock images of Colab, its past runtimes that a user may choose, and Kaggle: the setup cell
makes each fit.

Of every image: the torch, numpy and Python that stay are in lorabook's ranges, and the rest is
installed beside them. Of the newest, and with LORABOOK_ALL_STOCK=1 of all, in an environment with
its versions as far as wheels for this Python exist: before the setup cell no LoRA, after it
notebook 00.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from badges import repository
from lorabook import bootstrap

ROOT = Path(__file__).parent.parent
# The versions: https://github.com/googlecolab/backend-info, pip-freeze.gpu.txt (before 2026
# pip-freeze.txt), at the commits
# that its README names for the past runtimes. Kaggle's images are built on Colab's of 26 February
# and 14 May 2026, by
# https://github.com/Kaggle/docker-python, with transformers >= 5. All have torchao 0.10.0,
# ipywidgets 7.7.1, psutil 5.9.5.
COLUMNS = (
    "date",
    "python",
    "torch",
    "numpy",
    "diffusers",
    "peft",
    "transformers",
    "huggingface_hub",
    "datasets",
    "accelerate",
    "safetensors",
    "pillow",
    "tqdm",
    "matplotlib",
)
TABLE = """
Colab         2026-08-19  3.13  2.11.0  2.1.3  0.39.0  0.20.0  5.15.0  1.27.0  4.0.0   1.14.0  0.8.0  11.3.0  4.67.3  3.10.0
Colab-2026.07 2026-07-14  3.12  2.11.0  2.0.2  0.39.0  0.19.1  5.13.1  1.23.0  4.0.0   1.14.0  0.8.0  11.3.0  4.67.3  3.10.0
Colab-2026.04 2026-04-02  3.12  2.10.0  2.0.2  0.37.1  0.18.1  5.0.0   1.8.0   4.0.0   1.13.0  0.7.0  11.3.0  4.67.3  3.10.0
Colab-2026.01 2026-01-16  3.12  2.9.0   2.0.2  0.36.0  0.18.1  4.57.6  0.36.0  4.0.0   1.12.0  0.7.0  11.3.0  4.67.1  3.10.0
Colab-2025.10 2025-10-13  3.12  2.8.0   2.0.2  0.35.1  0.17.1  4.57.0  0.35.3  4.0.0   1.10.1  0.6.2  11.3.0  4.67.1  3.10.0
Colab-2025.07 2025-08-13  3.11  2.6.0   2.0.2  0.34.0  0.16.0  4.53.2  0.33.4  2.14.4  1.8.1   0.5.3  11.2.1  4.67.1  3.10.0
Kaggle-v170   2026-06-29  3.12  2.10.0  2.0.2  0.37.1  0.19.1  5.0.0   1.11.0  4.0.0   1.13.0  0.7.0  11.3.0  4.67.3  3.10.0
Kaggle-v168   2026-03-19  3.12  2.10.0  2.0.2  0.36.0  0.18.1  5.0.0   1.4.1   4.0.0   1.12.0  0.7.0  11.3.0  4.67.3  3.10.0
"""
IMAGES = {
    name: dict(zip(COLUMNS, rest, strict=True))
    | {"torchao": "0.10.0", "ipywidgets": "7.7.1", "psutil": "5.9.5"}
    for name, *rest in map(str.split, TABLE.strip().splitlines())
}
NEWEST, *PAST = IMAGES
TRIED = [NEWEST, *PAST] if os.environ.get("LORABOOK_ALL_STOCK") else [NEWEST]
INSTALLED = (
    "torchao",
    "diffusers",
    "peft",
    "transformers",
    "huggingface_hub",
    "datasets",
    "accelerate",
    "ipywidgets",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = (ROOT / "tests/notebooks/setup_cell.py").read_text()
UNET = str(ROOT / "data/tiny-sd/unet")
ADD = (
    f"import diffusers, peft; unet = diffusers.UNet2DConditionModel.from_pretrained({UNET!r}); "
    "unet.add_adapter(peft.LoraConfig(target_modules=['to_q']))"
)


def run(*command, **options):
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, **options
    )


def versions(python) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format=json").stdout)
    return {each["name"].lower().replace("_", "-"): each["version"] for each in reversed(listed)}


def in_trouble(python) -> set[str]:
    """What the doctor of an environment finds wrong."""
    told = json.loads(run(python, "-m", "lorabook", "doctor", "--json", cwd=ROOT).stdout)
    return {check["name"] for check in told["checks"] if check["verdict"] == "trouble"}


def outside(image) -> set[str]:
    """What of an image is outside of lorabook's ranges."""
    return {
        need.name
        for need in bootstrap.requirements()
        if need.name in INSTALLED and not need.specifier.contains(IMAGES[image][need.name])
    }


@pytest.fixture(params=TRIED)
def stock(request, tmp_path):
    """An image and the Python of an environment with its versions; what they leave open comes from
    that of the tests.
    """
    folder = tmp_path / "stock"
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin/python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    versions = [f"{name}=={IMAGES[request.param][name]}" for name in INSTALLED]
    installed = run(python, "-m", "pip", "install", "-q", "--no-compile", *versions)
    if installed.returncode:
        pytest.skip(f"no wheels of {request.param}'s versions here: {installed.stderr[-200:]}")
    yield request.param, python
    shutil.rmtree(folder)


@pytest.fixture
def book(tmp_path):
    """A repository with the work tree's package and data, to which git is led where the setup cell
    asks for the real one.
    """
    source = tmp_path / "source"
    for name in ("lorabook", "data"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "make")
        )
    shutil.copy(ROOT / "pyproject.toml", source)
    git = ("git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@example.org")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "book")):
        run(*git, *arguments, check=True)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository(),
        "COLAB_RELEASE_TAG": "a stand-in",
    }


@pytest.mark.parametrize("image", IMAGES)
def test_the_setup_cell_makes_a_stock_image_fit_and_leaves_its_torch_and_numpy(image, monkeypatch):
    there, kept = dict(IMAGES[image]), []

    def pip(command, *arguments):
        if command == "uninstall":
            return there.pop(arguments[-1])
        kept.append(Path(arguments[1]).read_text())
        there.update(
            {
                need.name: str(need.specifier).removeprefix(">=")
                for need in map(Requirement, arguments[2:])
            }
        )

    monkeypatch.setattr(bootstrap, "version_of", there.get)
    monkeypatch.setattr(bootstrap, "needs_of", lambda name: [])
    monkeypatch.setattr(bootstrap, "_pip", pip)
    assert SpecifierSet(PROJECT["requires-python"]).contains(there["python"])
    bootstrap.mend()
    assert (
        kept == [f"torch=={IMAGES[image]['torch']}\nnumpy=={IMAGES[image]['numpy']}\n"]
        and "torchao" not in there
    )
    assert not [misfit for need in bootstrap.requirements() for misfit in bootstrap.misfits(need)]


def test_a_stock_image_can_make_no_lora_until_the_setup_cell_has_run(
    stock, book, tmp_path, monkeypatch
):
    image, stock = stock
    refused = run(stock, "-c", ADD)
    assert refused.returncode and "incompatible version of torchao" in refused.stderr
    expected, others = outside(image), in_trouble(stock) - {"torchao", "a LoRA by peft"}
    assert (
        others == expected or image in PAST and others > expected
    )  # older ones do not suit each other, either
    before = versions(stock)
    kernel = tmp_path / "jupyter/kernels/stock/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(
        json.dumps(
            {
                "argv": [str(stock), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "stock",
                "language": "python",
                "env": book | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]},
            }
        )
    )
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    setup = next(
        cell for cell in notebook.cells if cell.cell_type == "code" and "git clone" in cell.source
    )
    setup.source = SETUP.replace("/tmp/lorabook-book", str(tmp_path / "book"))
    (tmp_path / "content").mkdir()
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="stock",
        resources={"metadata": {"path": str(tmp_path / "content")}},
    ).execute()
    after = versions(stock)
    assert "".join(output.text for output in setup.outputs).startswith("lorabook: installed")
    changed = {name for name in before if before[name] != after.get(name)}
    expected = {name.replace("_", "-") for name in expected | {"torchao"}}
    assert (
        changed == expected
        or image in PAST
        and changed > expected
        and not changed & set(bootstrap.KEPT)
    )
    assert run(stock, "-c", ADD).returncode == 0 and not in_trouble(stock)
