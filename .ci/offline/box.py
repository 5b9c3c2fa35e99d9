"""make offline: a folder from which laptops install lorabook without a network.

Runs before .venv is there, so by the standard library and pip alone. The files beside this one go
into the folder.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from start import EXTRAS, this_platform, this_python

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
BUILT = (
    ".git",
    ".venv*",
    "build",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".ipynb_checkpoints",
    "runs",
    "demo-lora",
)
# pip download asks the machine that it runs on for what `; sys_platform == "win32"` means, whatever
# --platform says.
PIP = """
import sys
from pip._vendor.packaging import markers
markers.default_environment = lambda: {environment}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def _manylinux(machine: str) -> tuple[str, ...]:
    return (
        *(f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)),
        f"manylinux2014_{machine}",
    )


PLATFORMS = {  # the tags of wheels; os_name, sys_platform, platform_system, platform_machine
    "linux-x86_64": (_manylinux("x86_64"), ("posix", "linux", "Linux", "x86_64")),
    "linux-aarch64": (_manylinux("aarch64"), ("posix", "linux", "Linux", "aarch64")),
    "macos-arm64": (("macosx_14_0_arm64",), ("posix", "darwin", "Darwin", "arm64")),
    "windows-amd64": (("win_amd64",), ("nt", "win32", "Windows", "AMD64")),
}


def environment(name: str, python: str) -> dict[str, str]:
    """What the markers of requirements mean on a platform; `python` as "3.12"."""
    told = dict(
        zip(
            ("os_name", "sys_platform", "platform_system", "platform_machine"),
            PLATFORMS[name][1],
            strict=True,
        )
    )
    return told | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "platform_release": "",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.9",
        "platform_version": "",
        "platform_python_implementation": "CPython",
    }


def checked(platforms: str, pythons: str) -> list[tuple[str, str]]:
    """Every platform with every Python, of words with blanks between; none means this machine's.

    Raises: ValueError for a platform that is not known, and for what is no Python from 3.11 on.
    """
    names, versions = platforms.split() or [this_platform()], pythons.split() or [this_python()]
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(
                f"unknown platform {name!r}; the platforms are: {', '.join(PLATFORMS)}"
            )
    for version in versions:
        if not re.fullmatch(r"3\.\d+", version) or int(version[2:]) < 11:
            raise ValueError(
                f"Python {version!r} is none for lorabook; give versions from 3.11 on, as in 3.11 3.12"
            )
    return [(name, version) for name in dict.fromkeys(names) for version in dict.fromkeys(versions)]


def requirements(name: str) -> list[str]:
    """What pip is to fetch for a platform: the book's needs, its build's, what start.py adds, and
    torch without CUDA.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = (
        project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["notebooks"]
    )
    return [*needs, *project["build-system"]["requires"], *EXTRAS, torch(name)]


def torch(name: str) -> str:
    """The requirement of torch: for Linux the default build brings gigabytes of CUDA, for the
    others it is a CPU build.
    """
    pinned = re.search(r"^torch==.*$", CONSTRAINTS.read_text(), re.M).group()
    return f"{pinned}+cpu" if name.startswith("linux") else pinned


def pip(name: str, python: str, *arguments) -> None:
    """pip download for another machine.

    Raises: ValueError with what is missing.
    """
    code = PIP.format(environment=environment(name, python))
    tags = [word for tag in PLATFORMS[name][0] for word in ("--platform", tag)]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "download",
            "-q",
            "--only-binary=:all:",
            "--python-version",
            python,
            *tags,
            *arguments,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        missing = re.findall(r"No matching distribution found for ([^\s(]+)", done.stderr)
        raise ValueError(
            f"no wheel of {missing[0]} within reach"
            if missing
            else done.stderr.strip().splitlines()[-1]
        )


def fetch(name: str, python: str, wheels: Path, cpu_wheels: str) -> str:
    """Put the wheels of one platform and Python into a folder; returns their number and size in
    words.
    """
    with tempfile.TemporaryDirectory(dir=wheels.parent) as fresh:
        if name.startswith("linux"):
            pip(
                name,
                python,
                "-d",
                fresh,
                "--no-deps",
                "--retries",
                "1",
                "--timeout",
                "15",
                "--extra-index-url",
                cpu_wheels,
                torch(name),
            )
        pip(
            name, python, "-d", fresh, "--find-links", fresh, "-c", CONSTRAINTS, *requirements(name)
        )
        files = list(Path(fresh).iterdir())
        told = f"{len(files)} wheels, {megabytes(files)} MB"
        for file in files:
            file.replace(wheels / file.name)
    return told


def megabytes(files) -> int:
    """The size of files, in MB."""
    return round(sum(file.stat().st_size for file in files) / 1e6)


def book_files() -> list[Path]:
    """The repository's files, from its root, as they are: what git does not ignore, or without git
    what was not built.
    """
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if listed.returncode:
            raise ValueError(f"git cannot list the repository: {' '.join(listed.stderr.split())}")
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
    kept = [
        name
        for name in names
        if not any(fnmatch(part, kind) for part in name.parts for kind in BUILT)
    ]
    return [name for name in kept if (ROOT / name).is_file()]


def emptied(box: Path) -> None:
    """Make the folder, without what an earlier `make offline` left in it.

    Raises: ValueError if there is anything else in it.
    """
    if (
        box.exists()
        and not (box / "platforms.txt").is_file()
        and (not box.is_dir() or any(box.iterdir()))
    ):
        raise ValueError(
            f"{str(box)!r} is there, and not made by make offline; give BOX= another folder"
        )
    shutil.rmtree(box, ignore_errors=True)
    (box / "wheels").mkdir(parents=True)


def fill(box: Path, made: list[str]) -> None:
    """Copy the book and what starts it into the folder, and say in it what it is for."""
    for name in book_files():
        (box / "book" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, box / "book" / name)
    (box / "platforms.txt").write_text("".join(f"{line}\n" for line in made))
    for name in ("start.py", "start.sh"):
        shutil.copy2(HERE / name, box)
    size = megabytes(file for file in box.rglob("*") if file.is_file())
    words = {"platforms": "".join(f"    {line}\n" for line in made), "size": size, "name": box.name}
    readme = (HERE / "README.txt").read_text(encoding="utf-8").format(**words)
    for name, text in (("README.txt", readme), ("start.bat", (HERE / "start.bat").read_text())):
        (box / name).write_text(text, encoding="utf-8", newline="\r\n")  # Windows reads these


def build(box: Path, pairs: list[tuple[str, str]], cpu_wheels: str) -> bool:
    """Build the folder, for what there are wheels for; returns whether that is all.

    Raises: ValueError if it is nothing, or the folder is in use.
    """
    emptied(box)
    made = []
    for name, python in pairs:
        try:
            print(
                f"{name}, Python {python}: {fetch(name, python, box / 'wheels', cpu_wheels)}",
                flush=True,
            )
            made.append(f"{name} {python}")
        except ValueError as error:
            print(f"{name}, Python {python}: left out, {error}", file=sys.stderr, flush=True)
    if not made:
        shutil.rmtree(box)
        raise ValueError("no folder was made: there are no wheels for any of what was asked for")
    fill(box, made)
    print(
        f"{box}: {megabytes(file for file in box.rglob('*') if file.is_file())} MB; its README.txt says how to copy it"
    )
    return len(made) == len(pairs)


def main() -> int:
    """Read the arguments, build; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("box", type=Path, help="the folder to build")
    parser.add_argument(
        "--platforms", default="", help=f"words of: {' '.join(PLATFORMS)}; none: this machine's"
    )
    parser.add_argument("--pythons", default="", help="versions, as in 3.11 3.12; none: this one")
    parser.add_argument(
        "--cpu-wheels", required=True, help="where torch's builds without CUDA are, for Linux"
    )
    told = parser.parse_args()
    try:
        if not find_spec("pip"):
            raise ValueError(
                "this Python has no pip; install python3-pip, or make offline PYTHON=.venv/bin/python"
            )
        return 0 if build(told.box, checked(told.platforms, told.pythons), told.cpu_wheels) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
