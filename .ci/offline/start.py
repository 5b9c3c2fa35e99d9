"""Installs the book into this folder, once and without a network; then opens its notebooks, or runs
a command.

    python start.py                 JupyterLab, in book/notebooks
    python start.py demo            the same as python -m lorabook demo; so do doctor, inspect,
    convert

start.sh and start.bat find a Python that this folder has wheels for, and run this.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOOK, WHEELS, VENV = HERE / "book", HERE / "wheels", HERE / "venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = (
    "pip",
    "tensorboard",
)  # pip for who wants more; training reports to TensorBoard, and says so where it is not
STAMP = (
    VENV / "installed-in.txt"
)  # written last: no stamp, or that of another folder, and the book is installed anew


def this_platform() -> str:
    """The system and processor that this Python is made for, for example "linux-x86_64"."""
    system = platform.system().lower().replace("darwin", "macos")
    return f"{system}-{platform.machine().lower() if sys.maxsize > 2**32 else '32-bit'}"


def this_python() -> str:
    """This Python's version, for example "3.12"."""
    return ".".join(map(str, sys.version_info[:2]))


def made_for() -> list[str]:
    """What the folder has wheels for: lines such as "linux-x86_64 3.12"."""
    return (HERE / "platforms.txt").read_text().splitlines()


def fits() -> bool:
    """Whether the folder has wheels for this Python."""
    return f"{this_platform()} {this_python()}" in made_for()


def installed() -> bool:
    """Whether the book is installed, and the folder is where it was then."""
    return PYTHON.exists() and STAMP.is_file() and STAMP.read_text(encoding="utf-8") == str(HERE)


def install() -> None:
    """Make the virtual environment anew; pip runs from its wheel, so that no system package of it
    is needed.
    """
    print(f"installing the book into {VENV}: once, a minute or two, without a network", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, symlinks=os.name != "nt")
    pip = next(WHEELS.glob("pip-*.whl")) / "pip"
    subprocess.run(
        [
            PYTHON,
            pip,
            "--isolated",
            "install",
            "-qq",
            "--no-index",
            "--find-links",
            WHEELS,
            "--no-compile",
            "-c",
            BOOK / "constraints.txt",
            *EXTRAS,
            "-e",
            f"{BOOK}[notebooks]",
        ],
        check=True,
    )
    STAMP.write_text(str(HERE), encoding="utf-8")


def run(arguments: list[str]) -> int:
    """Open the notebooks, or run lorabook with these arguments; returns the exit status."""
    command = (
        ["lorabook", *arguments]
        if arguments
        else ["jupyterlab", str(BOOK / "notebooks/00_start_here.ipynb")]
    )
    environment = {"HF_HUB_OFFLINE": "1"} | os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"}
    signal.signal(
        signal.SIGINT, lambda *_: None
    )  # Ctrl-C is for what runs, which says good-bye in its own way
    return subprocess.call([PYTHON, "-m", *command], env=environment)


def main(arguments: list[str]) -> int:
    """Install where that is due, and run; returns the exit status."""
    if arguments == ["--fits"]:
        return 0 if fits() else 1
    try:
        if not installed():
            if not fits():
                raise SystemExit(
                    f"error: this folder has no wheels for {this_platform()} and Python {this_python()}; "
                    f"it has them for {', '.join(made_for())}"
                )
            install()
        return run(arguments)
    except subprocess.CalledProcessError:
        raise SystemExit(
            "error: the book could not be installed, for the reason above; README.txt has remedies"
        ) from None
    except OSError as error:
        raise SystemExit(
            f"error: {error}; is this folder whole, and on the laptop's disk, where you may write?"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
