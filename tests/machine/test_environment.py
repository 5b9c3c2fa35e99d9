import os
import re
import sys
import types
from pathlib import Path

import pytest

from lorabook.machine import environment as places
from lorabook.machine.environment import place, results_folder, secret


class SecretNotFoundError(Exception):
    pass


class NotebookAccessError(Exception):
    pass


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for sign in places._VARIABLES:
        monkeypatch.delenv(sign, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def colab(monkeypatch):
    """Colab, whose secrets and Drive answer by what is put into `answers`."""
    answers = {}

    def get(name):
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    monkeypatch.setenv("COLAB_RELEASE_TAG", "a stand-in")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setitem(sys.modules, "google.colab.userdata", types.SimpleNamespace(get=get))
    monkeypatch.setitem(sys.modules, "google.colab.drive", types.SimpleNamespace(mount=get))
    return answers


@pytest.fixture
def kaggle(monkeypatch):
    """Kaggle, whose secrets answer by what is put into `answers`; asking for another is an error,
    as there.
    """
    answers = {}

    def get_secret(name):
        if name not in answers:
            raise ConnectionError("No user secrets exist for kernel id 1 and label HF_TOKEN.")
        return answers[name]

    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    client = types.SimpleNamespace(get_secret=get_secret)
    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: client)
    )
    return answers


def test_a_laptop_is_no_place_of_its_own_and_has_no_secrets():
    assert place() is None and secret("HF_TOKEN") == (None, "")


def test_secrets_of_colab_and_kaggle_are_read(colab, kaggle, monkeypatch):
    colab["HF_TOKEN"], kaggle["HF_TOKEN"] = " of Colab\n", "of Kaggle"
    assert place() == "colab" and secret("HF_TOKEN") == ("of Colab", "")
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert place() == "kaggle" and secret("HF_TOKEN") == ("of Kaggle", "")


@pytest.mark.parametrize(
    "error, said",
    [
        (
            SecretNotFoundError("Secret HF_TOKEN does not exist."),
            "there is no secret HF_TOKEN .* key at the left edge",
        ),
        (
            NotebookAccessError("Notebook does not have access"),
            "may not read the secret HF_TOKEN: switch its",
        ),
        (
            TimeoutError("nobody answers"),
            r"could not be read \(TimeoutError\): open the notebook in a browser",
        ),
    ],
)
def test_a_refusal_of_colab_is_explained_in_a_sentence(colab, error, said):
    colab["HF_TOKEN"] = error
    value, why = secret("HF_TOKEN")
    assert value is None and re.search(said, why) and len(why) < 200


def test_a_refusal_of_kaggle_is_explained_in_a_sentence(kaggle):
    assert secret("HF_TOKEN")[1].startswith("there is no secret HF_TOKEN")
    assert "Add-ons > Secrets of Kaggle" in secret("HF_TOKEN")[1]


def test_an_empty_secret_is_none(kaggle):
    kaggle["HF_TOKEN"] = " "
    assert secret("HF_TOKEN") == (
        None,
        "the secret HF_TOKEN is empty: fill it in, behind Add-ons > Secrets of Kaggle",
    )


def test_results_go_beside_the_notebook_or_where_one_wishes(tmp_path):
    assert results_folder() == Path("runs") and (tmp_path / "runs").is_dir()
    assert (
        results_folder(tmp_path / "a/b").is_dir()
        and results_folder(tmp_path / "a/b") == tmp_path / "a/b"
    )


def test_results_go_to_drive_once_it_is_open(colab, monkeypatch, tmp_path):
    monkeypatch.setattr(places, "DRIVE", tmp_path / "drive")
    colab[str(tmp_path / "drive")] = None
    assert (
        results_folder("drive") == tmp_path / "drive/MyDrive/lorabook"
        and results_folder("drive").is_dir()
    )


def test_a_drive_that_stays_closed_is_told(colab):
    colab[str(places.DRIVE)] = ValueError("mount failed")
    with pytest.raises(
        ValueError, match=r"Google Drive could not be opened \(ValueError\); run the cell again"
    ):
        results_folder("drive")


def test_results_go_to_kaggles_output(kaggle, monkeypatch, tmp_path):
    monkeypatch.setattr(places, "KAGGLE_OUTPUT", tmp_path)
    assert results_folder("kaggle") == tmp_path / "lorabook"


@pytest.mark.parametrize("save_to, where", [("drive", "Colab"), ("kaggle", "Kaggle")])
def test_a_place_that_is_not_here_is_an_error(save_to, where):
    with pytest.raises(
        ValueError, match=f"save_to='{save_to}' works on {where} only; give a folder"
    ):
        results_folder(save_to)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file.*cannot be made .*; give save_to another"):
        results_folder(tmp_path / "file" / "x")
    assert os.listdir(tmp_path) == ["file"]
