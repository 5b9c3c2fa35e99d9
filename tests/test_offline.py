"""The workshop in a box: what `make offline` puts in, and a real one that installs and draws
without a network.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / ".ci/offline"
sys.path.insert(0, str(SCRIPTS))
import box  # noqa: E402
import start  # noqa: E402

sys.path.remove(str(SCRIPTS))
WITHOUT_NETWORK = ("unshare", "-rn")
IN_THE_BOX = """
import runpy, socket, sys
from jupyter_client import KernelManager
import lorabook as lb
assert [name for _, name in socket.if_nameindex()] == ["lo"]
assert KernelManager(kernel_name="python3").format_kernel_cmd()[0] == sys.executable
runpy.run_path("setup_cell.py")
assert lb.doctor().fit
lb.load_pipeline("tiny-sd")("a red cat", num_inference_steps=2).images[0].save("cat.png")
"""


def run(*command, **options):
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=900, **options
    )


def wheel(folder, name, *needs):
    """A wheel of nothing but its needs."""
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}-1.dist-info/METADATA", "\n".join(lines))
        file.writestr(
            f"{name}-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{name}-1.dist-info/RECORD", "")


@pytest.fixture
def filled(tmp_path):
    """A box without wheels."""
    folder = tmp_path / "a box"
    box.emptied(folder)
    box.fill(folder, ["windows-amd64 3.12", "macos-arm64 3.12"])
    return folder


def test_an_unknown_platform_is_one_sentence_that_lists_the_known_ones(tmp_path):
    done = run(
        sys.executable,
        SCRIPTS / "box.py",
        tmp_path / "x",
        "--platforms",
        "amiga",
        "--cpu-wheels",
        "none",
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unknown platform 'amiga'")
    assert done.stderr.count("\n") == 1 and all(name in done.stderr for name in box.PLATFORMS)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("python", ["3.10", "3.12.1", "python3.12", "4.0"])
def test_a_python_that_lorabook_cannot_use_is_refused(python):
    with pytest.raises(
        ValueError, match=f"Python '{python}' is none for lorabook; give versions from 3.11 on"
    ):
        box.checked("linux-x86_64", python)


def test_every_platform_goes_with_every_python_once():
    assert box.checked("macos-arm64 windows-amd64", "3.11 3.12 3.11") == [
        (name, python) for name in ("macos-arm64", "windows-amd64") for python in ("3.11", "3.12")
    ]


def test_without_a_choice_it_is_for_this_machine(monkeypatch):
    monkeypatch.setattr(box, "this_platform", lambda: "linux-aarch64")
    assert box.checked("", "") == [("linux-aarch64", ".".join(map(str, sys.version_info[:2])))]


def test_linux_gets_a_torch_without_cuda():
    asked = {name: box.requirements(name)[-1].endswith("+cpu") for name in box.PLATFORMS}
    assert asked == {
        "linux-x86_64": True,
        "linux-aarch64": True,
        "macos-arm64": False,
        "windows-amd64": False,
    }


@pytest.mark.parametrize(
    "name, brought",
    [
        ("windows-amd64", {"a", "w"}),
        ("macos-arm64", {"a", "m"}),
        ("linux-x86_64", {"a", "x"}),
        ("linux-aarch64", {"a"}),
    ],
)
def test_what_only_one_platform_needs_is_fetched_for_it_alone(tmp_path, name, brought):
    wheel(
        tmp_path,
        "a",
        'w; os_name == "nt" and python_version == "3.12"',
        'm; sys_platform == "darwin"',
        'x; platform_system == "Linux" and platform_machine == "x86_64"',
        'old; python_version < "3.12"',
    )
    for other in ("w", "m", "x", "old"):
        wheel(tmp_path, other)
    box.pip(name, "3.12", "-d", tmp_path / "got", "--no-index", "--find-links", tmp_path, "a")
    assert {file.name.split("-")[0] for file in (tmp_path / "got").iterdir()} == brought


def test_a_wheel_that_is_not_to_be_had_is_named(tmp_path):
    wheel(tmp_path, "a", "nowhere>=2")
    with pytest.raises(ValueError, match="no wheel of nowhere>=2 within reach"):
        box.pip(
            "windows-amd64",
            "3.12",
            "-d",
            tmp_path / "got",
            "--no-index",
            "--find-links",
            tmp_path,
            "a",
        )


def test_the_platforms_that_can_be_made_are_made_and_the_others_told(tmp_path, monkeypatch, capsys):
    def fetch(name, *_):
        if name == "macos-arm64":
            raise ValueError("no wheel of torch within reach")
        return "3 wheels, 1 MB"

    monkeypatch.setattr(box, "fetch", fetch)
    assert not box.build(
        tmp_path / "box", [("macos-arm64", "3.12"), ("windows-amd64", "3.12")], "none"
    )
    assert (tmp_path / "box/platforms.txt").read_text() == "windows-amd64 3.12\n"
    assert (
        capsys.readouterr().err
        == "macos-arm64, Python 3.12: left out, no wheel of torch within reach\n"
    )
    with pytest.raises(ValueError, match="no folder was made"):
        box.build(tmp_path / "box", [("macos-arm64", "3.12")], "none")


def test_the_book_goes_in_without_what_was_built():
    files = {str(file) for file in box.book_files()}
    assert {
        "pyproject.toml",
        "constraints.txt",
        "lorabook/worlds.py",
        "notebooks/00_start_here.ipynb",
        "data/tiny-sd/model_index.json",
    } <= files
    assert not [
        file
        for file in files
        if re.search(r"^(build|\.git|\.venv)/|__pycache__|egg-info|/runs/", file)
    ]


def test_the_book_goes_in_from_a_folder_without_git_too(tmp_path, monkeypatch):
    for name in (
        "lorabook/worlds.py",
        ".venv/bin/x",
        "build/offline/x",
        "notebooks/runs/x",
        "lorabook/__pycache__/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(box, "ROOT", tmp_path)
    assert [str(file) for file in box.book_files()] == ["lorabook/worlds.py"]


def test_a_folder_of_other_things_is_left_alone_and_an_older_box_made_anew(tmp_path, filled):
    (tmp_path / "mine").write_text("")
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ValueError, match="not made by make offline; give BOX= another folder"):
            box.emptied(taken)
    box.emptied(filled)
    assert [file.name for file in filled.iterdir()] == ["wheels"]


def test_readme_names_what_is_in_the_folder_and_whom_it_is_for(filled):
    text = (filled / "README.txt").read_text(encoding="utf-8")
    for word in (
        "start.sh",
        "start.bat",
        "start.py",
        "windows-amd64 3.12",
        "macos-arm64 3.12",
        "-c box.zip a box",
    ):
        assert word in text
    size = int(re.search(r"It has (\d+) MB", text)[1])
    assert abs(size - box.megabytes(file for file in filled.rglob("*") if file.is_file())) <= 1
    options = re.search(r'PLATFORMS="(.*)" PYTHONS="(.*)"', text).groups()
    assert box.checked(*options)


def test_windows_gets_its_line_ends_and_linux_may_run_its_script(filled):
    assert (
        b"\r\n" in (filled / "start.bat").read_bytes()
        and b"\r" not in (filled / "start.sh").read_bytes()
    )
    assert os.access(filled / "start.sh", os.X_OK)


def test_a_laptop_that_the_folder_is_not_for_is_told_so_in_a_sentence(filled):
    direct = run(sys.executable, filled / "start.py")
    assert direct.returncode == 1 and direct.stderr.count("\n") == 1
    assert (
        direct.stderr.startswith("error: this folder has no wheels for")
        and "windows-amd64 3.12" in direct.stderr
    )
    searched = run(filled / "start.sh")
    assert searched.returncode == 1 and searched.stderr.count("\n") == 1
    assert (
        searched.stderr.startswith("error: no Python was found")
        and "windows-amd64 3.12,macos-arm64" in searched.stderr
    )


def test_a_folder_that_was_moved_or_lost_its_python_is_installed_anew(tmp_path, monkeypatch):
    for name in ("PYTHON", "STAMP"):
        monkeypatch.setattr(start, name, tmp_path / name)
    start.PYTHON.write_text("")
    assert not start.installed()
    start.STAMP.write_text(str(start.HERE))
    assert start.installed()
    start.STAMP.write_text("/elsewhere")
    assert not start.installed()
    start.STAMP.write_text(str(start.HERE))
    start.PYTHON.unlink()
    assert not start.installed()


@pytest.mark.parametrize(
    "arguments, command",
    [
        ([], ["jupyterlab", str(start.BOOK / "notebooks/00_start_here.ipynb")]),
        (["demo"], ["lorabook", "demo"]),
    ],
)
def test_what_is_started_asks_no_hub_unless_told_to(monkeypatch, arguments, command):
    calls = []
    monkeypatch.setattr(
        start.subprocess, "call", lambda told, env: calls.append((told[2:], env["HF_HUB_OFFLINE"]))
    )
    monkeypatch.setattr(start.signal, "signal", lambda *_: None)
    for setting in (None, "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", setting) if setting else monkeypatch.delenv(
            "HF_HUB_OFFLINE", raising=False
        )
        start.run(arguments)
    assert calls == [(command, "1"), (command, "0")]


def test_a_real_folder_installs_and_draws_without_a_network(tmp_path):
    if not shutil.which("unshare") or run(*WITHOUT_NETWORK, "true").returncode:
        pytest.skip("a network cannot be taken away here (unshare -rn)")
    built = run(
        "make", "offline", f"BOX={tmp_path / 'built'}", f"PYTHON={sys.executable}", cwd=ROOT
    )
    if "within reach" in built.stderr:
        pytest.skip(f"no wheels for a folder: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    here = (tmp_path / "built").rename(tmp_path / "für alle")
    shutil.copy(ROOT / "tests/notebooks/setup_cell.py", here)
    first = run(*WITHOUT_NETWORK, here / "start.sh", "--help")
    assert first.returncode == 0 and first.stdout.startswith("installing the book into"), (
        first.stderr
    )
    drawn = run(*WITHOUT_NETWORK, start.PYTHON.relative_to(start.HERE), "-c", IN_THE_BOX, cwd=here)
    assert drawn.returncode == 0 and (here / "cat.png").is_file(), drawn.stderr
    again = run(*WITHOUT_NETWORK, here / "start.sh", "--help")
    assert again.returncode == 0 and again.stdout.startswith("usage: lorabook"), again.stderr
    shutil.rmtree(here)
