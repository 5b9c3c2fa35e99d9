import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lorabook.machine.environment import _VARIABLES

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETUP = (Path(__file__).parent / "setup_cell.py").read_text().rstrip("\n")
ADDRESS = next(word for word in SETUP.split() if word.startswith("https://"))
TAIL = "\nprint('modules:', 'lorabook' in sys.modules)"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_has_the_setup_cell_word_for_word(path):
    sources = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    assert sources.count(SETUP) == 1 and sum("git clone" in source for source in sources) == 1


def run(folder, *options, **environ):
    """The cell in a Python of its own, in a folder, with nothing in the environment but what is
    given.
    """
    cell = SETUP.replace("/tmp/lorabook-book", str(folder / "lorabook-book"))
    return subprocess.run(
        [sys.executable, *options, "-c", cell + TAIL],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"} | environ,
    )


def led_to(source) -> dict[str, str]:
    """What leads git to a folder where it is asked for the repository."""
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }


@pytest.fixture
def source(tmp_path):
    """A repository with a package whose `mend` says that it was called."""
    package = tmp_path / "source/lorabook"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "bootstrap.py").write_text("def mend():\n    print('mended')\n")
    for words in (
        "init -q",
        "add .",
        "-c user.name=a -c user.email=a@example.org commit -q -m book",
    ):
        subprocess.run(["git", "-C", package.parent, *words.split()], check=True)
    return package.parent


@pytest.fixture
def content(tmp_path):
    """The folder in which a notebook runs."""
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def test_where_the_book_is_installed_it_does_nothing(content):
    done = run(content)
    assert done.stdout == "modules: False\n" and done.stderr == "" and not list(content.iterdir())


def test_it_changes_nothing_on_a_laptop_without_the_book(content):
    done = run(content, "-S")
    assert done.returncode and "this kernel has no lorabook: start it by `make lab`" in done.stderr
    assert not list(content.iterdir())


@pytest.mark.parametrize("sign", sorted(_VARIABLES))
def test_on_colab_and_kaggle_it_fetches_the_book_once_and_mends(content, source, sign):
    assert run(content, "-S", **led_to(source), **{sign: "x"}).stdout == "mended\nmodules: True\n"
    assert (
        run(content, "-S", **led_to("/nowhere"), **{sign: "x"}).stdout == "mended\nmodules: True\n"
    )


def test_a_folder_that_is_only_called_lorabook_does_not_count_as_the_book(content, source):
    (content / "lorabook").mkdir()
    assert "mended" in run(content, "-S", **led_to(source), COLAB_RELEASE_TAG="x").stdout


def test_without_internet_it_says_what_to_switch_on(content):
    done = run(content, "-S", **led_to("/nowhere"), KAGGLE_KERNEL_RUN_TYPE="x")
    assert done.returncode and "the book could not be fetched" in done.stderr.splitlines()[-1]
