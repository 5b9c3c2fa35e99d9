"""Where a notebook runs, Colab, Kaggle or elsewhere: its secrets, and where results go."""

import os
import sys
from importlib import import_module
from pathlib import Path

DRIVE, KAGGLE_OUTPUT = Path("/content/drive"), Path("/kaggle/working")
_VARIABLES = {"COLAB_RELEASE_TAG": "colab", "KAGGLE_KERNEL_RUN_TYPE": "kaggle"}
_MODULES = {"google.colab": "colab", "kaggle_secrets": "kaggle"}
_PANELS = {"colab": "the key at the left edge of Colab", "kaggle": "Add-ons > Secrets of Kaggle"}


def place() -> str | None:
    """ "colab", "kaggle", or None anywhere else."""
    names = [name for variable, name in _VARIABLES.items() if variable in os.environ]
    names += [name for module, name in _MODULES.items() if module in sys.modules]
    return names[0] if names else None


def secret(name: str) -> tuple[str | None, str]:
    """A secret that the user keeps at Colab or Kaggle, and "".

    Or None and a sentence that says why there is none, which is "" outside both.
    """
    here = place()
    if here is None:
        return None, ""
    try:
        if here == "colab":
            from google.colab import userdata

            value = userdata.get(name)
        else:
            value = import_module("kaggle_secrets").UserSecretsClient().get_secret(name)
    except Exception as error:  # each has classes of its own, which can be imported nowhere else
        return None, f"{_refusal(name, error)} {_PANELS[here]}"
    value = (value or "").strip() or None
    reason = "" if value else f"the secret {name} is empty: fill it in, behind {_PANELS[here]}"
    return value, reason


def _refusal(name: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "SecretNotFoundError" or "No user secrets exist" in str(error):
        return (
            f"there is no secret {name} that this notebook may read: make it, and switch it on for "
            "this notebook, behind"
        )
    if kind == "NotebookAccessError":
        return (
            f"this notebook may not read the secret {name}: switch its notebook access on, behind"
        )
    return (
        f"the secret {name} could not be read ({kind}): open the notebook in a browser, "
        "and look behind"
    )


def results_folder(save_to: str | os.PathLike | None = None) -> Path:
    """The folder for a notebook's results; on Colab and Kaggle the rest is gone with the machine.

    Args:
        save_to: "drive" for the folder lorabook of Google Drive, for which Colab asks permission;
            "kaggle" for /kaggle/working/lorabook, which Kaggle keeps with a saved version; any
            other folder; None for the folder runs beside the notebook.

    Returns:
        The folder, which is there.

    Raises:
        ValueError: If that place cannot be reached from here, or the folder cannot be made.
    """
    if save_to == "drive":
        folder = _drive() / "lorabook"
    elif save_to == "kaggle":
        if place() != "kaggle":
            raise ValueError("save_to='kaggle' works on Kaggle only; give a folder")
        folder = KAGGLE_OUTPUT / "lorabook"
    else:
        folder = Path(save_to or "runs").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder {str(folder)!r} cannot be made ({error.strerror}); give save_to another"
        ) from None
    return folder


def _drive() -> Path:
    if place() != "colab":
        raise ValueError(
            "save_to='drive' works on Colab only; give a folder, "
            "which may lie in a synchronised Drive"
        )
    try:
        import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:  # refused in the dialogue, or no browser to show one in
        raise ValueError(
            f"Google Drive could not be opened ({type(error).__name__}); run the cell again and "
            "allow it, or leave save_to out and download the folder runs"
        ) from None
    return DRIVE / "MyDrive"
