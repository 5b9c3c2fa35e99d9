"""Where a notebook runs, Colab, Kaggle or elsewhere: its secrets, and where what it made is kept."""

import os
import sys
from importlib import import_module
from pathlib import Path

DRIVE = Path("/content/drive")
_SIGNS = {"COLAB_RELEASE_TAG": "colab", "KAGGLE_KERNEL_RUN_TYPE": "kaggle"}
_MODULES = {"google.colab": "colab", "kaggle_secrets": "kaggle"}
_PANELS = {"colab": "the key at the left edge of Colab", "kaggle": "Add-ons > Secrets of Kaggle"}


def place() -> str | None:
    """ "colab", "kaggle", or None anywhere else."""
    named = [name for variable, name in _SIGNS.items() if variable in os.environ]
    return next(
        iter(named + [name for module, name in _MODULES.items() if module in sys.modules]), None
    )


def secret(name: str) -> tuple[str | None, str]:
    """A secret that the user keeps at Colab or Kaggle.

    Args:
        name: for example "HF_TOKEN".
    Returns: the secret and ""; or None and a sentence that says why there is none, which is "" outside both.
    """
    here = place()
    if here is None:
        return None, ""
    try:
        value = (_ask_colab if here == "colab" else _ask_kaggle)(name)
    except Exception as error:  # each has classes of its own, which can be imported nowhere else
        return None, _refusal(name, here, error)
    found = (value or "").strip() or None
    return found, "" if found else f"the secret {name} is empty: fill it in, behind {_PANELS[here]}"


def _ask_colab(name: str) -> str | None:
    from google.colab import userdata

    return userdata.get(name)


def _ask_kaggle(name: str) -> str | None:
    return import_module("kaggle_secrets").UserSecretsClient().get_secret(name)


def _refusal(name: str, here: str, error: Exception) -> str:
    kind, said = type(error).__name__, str(error)
    if kind == "SecretNotFoundError" or "No user secrets exist" in said:
        return (
            f"there is no secret {name} that this notebook may read: make it, and switch it on for this notebook, "
            f"behind {_PANELS[here]}"
        )
    if kind == "NotebookAccessError":
        return f"this notebook may not read the secret {name}: switch its notebook access on, behind {_PANELS[here]}"
    return f"the secret {name} could not be read ({kind}): open the notebook in a browser, and look behind {_PANELS[here]}"


def results_folder(save_to: str | os.PathLike | None = None) -> Path:
    """The folder for what a notebook makes; on Colab and Kaggle the rest is gone with the machine.

    Args:
        save_to: "drive" for the folder lorabook of Google Drive, which Colab then asks leave for; "kaggle" for
            /kaggle/working/lorabook, which Kaggle keeps with a saved version; any other folder; None for the folder
            runs beside the notebook.
    Returns: the folder, which is there.
    Raises: ValueError if that place cannot be reached from here, or the folder cannot be made.
    """
    if save_to == "drive":
        folder = _mounted() / "lorabook"
    elif save_to == "kaggle":
        folder = _kaggle_output() / "lorabook"
    else:
        folder = Path(save_to or "runs").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder {str(folder)!r} cannot be made ({error.strerror}); give save_to another"
        ) from None
    return folder


def _kaggle_output() -> Path:
    if place() != "kaggle":
        raise ValueError("save_to='kaggle' works on Kaggle only; give a folder")
    return Path("/kaggle/working")


def _mounted() -> Path:
    if place() != "colab":
        raise ValueError(
            "save_to='drive' works on Colab only; give a folder, which may lie in a synchronised Drive"
        )
    try:
        import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:  # refused in the dialogue, or no browser to show one in
        raise ValueError(
            f"Google Drive could not be opened ({type(error).__name__}); run the cell again and allow it, "
            "or leave save_to out and download the folder runs"
        ) from None
    return DRIVE / "MyDrive"
