"""Is this machine fit for the book, and what mends it: `lb.doctor()` and `lorabook doctor`."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lorabook.bootstrap import Misfit, bad_torchao, misfits, requirements, version_of
from lorabook.machine.environment import place, secret
from lorabook.show.tables import as_html, as_text

OK, WARNING, TROUBLE = "ok", "warning", "trouble"
_HEADS = ("check", "found", "verdict", "what mends it")
_GPUS = {
    "colab": "Runtime > Change runtime type > T4 GPU",
    "kaggle": "Settings > Accelerator > GPU T4 x2",
}
_WHY = {"diffusers": "older ones fail on text encoders' adapters beside transformers 5.6"}
_OLDER_GPUS = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"  # from Maxwell on
_PYTHON = (3, 11)
_GB = 1e9
_SMALL_GPU, _FULL_DISK, _SMALL_DISK = 6, 1, 8  # GB; Stable Diffusion 1.5 is a download of 5.5 GB


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `verdict` is "ok", "warning" or "trouble", `mend` the command or click that mends it."""

    name: str
    found: str
    verdict: str = OK
    mend: str = ""


class Checkup(Sequence):
    """The checks of `doctor`; shows itself."""

    def __init__(self, checks: Iterable[Check]):
        self.checks = tuple(checks)

    def __getitem__(self, index):
        """The check of a number, or of a name."""
        if isinstance(index, str):
            return next(check for check in self.checks if check.name == index)
        return self.checks[index]

    def __len__(self) -> int:
        return len(self.checks)

    @property
    def fit(self) -> bool:
        """Whether nothing is in trouble."""
        return all(check.verdict != TROUBLE for check in self.checks)

    def as_dict(self) -> dict:
        """The same as plain data, as `lorabook doctor --json` prints it."""
        return {"fit": self.fit, "checks": [asdict(check) for check in self.checks]}

    def _summary(self) -> str:
        counts = {
            verdict: sum(check.verdict == verdict for check in self.checks)
            for verdict in (TROUBLE, WARNING)
        }
        told = [f"{verdict}: {count}" for verdict, count in counts.items() if count]
        return ", ".join(told) or "all is well"

    def _cells(self) -> list[list[str]]:
        return [[check.name, check.found, check.verdict, check.mend] for check in self.checks]

    def __str__(self):
        return f"{as_text(_HEADS, self._cells())}\n{self._summary()}"

    __repr__ = __str__

    def _repr_html_(self):
        return f"{as_html(_HEADS, self._cells())}<p>{self._summary()}</p>"


def doctor() -> Checkup:
    """Look at all that lorabook needs: Python, packages and how they suit each other, GPU, disk, whether a LoRA can be made.

    Returns: a check a line, with a verdict and what mends it. It never raises, shows no token and changes nothing.
    """
    if _python().verdict == TROUBLE:
        return Checkup([_python()])  # everything else waits for it
    needed = requirements()
    packages = [
        _safely(need.name, lambda need=need: _package(need.name, misfits(need))) for need in needed
    ]
    others = {
        "GPU": _gpu,
        "disk": _disk,
        "torchao": _torchao,
        "a LoRA by peft": _lora,
        "a pipeline by diffusers": _pipeline,
        "Hub token": _token,
    }
    return Checkup([_python(), *packages, *(_safely(name, look) for name, look in others.items())])


def _safely(name: str, look: Callable[[], Check]) -> Check:
    """A check, or what went wrong in it: also a broken installation is to be told in a table."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return look()
    except Exception as error:
        return Check(name, f"could not be looked at: {_brief(error)}", WARNING)


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _python() -> Check:
    version, wanted = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, _PYTHON))
    if sys.version_info >= _PYTHON:
        return Check("Python", version)
    return Check(
        "Python",
        f"{version}; lorabook needs {wanted} or newer",
        TROUBLE,
        f"make lab PYTHON=python{wanted}",
    )


def _package(name: str, wrong: Sequence[Misfit]) -> Check:
    version = version_of(name)
    if not wrong:
        return _lab_slides(version) if name == "ipywidgets" else Check(name, version)
    ranges = dict.fromkeys(
        f'"{misfit.requirement.name}{misfit.requirement.specifier}"' for misfit in wrong
    )
    first, why = wrong[0], ""
    if first.whose == "lorabook":  # its own version is the wrong one, and stands there already
        why = f" ({_WHY[name]})" if name in _WHY and version else ""
        first = f"lorabook needs {first.requirement.specifier}"
    found = f"{version or 'not there'}; {first}{why}"
    return Check(
        name, found, WARNING if name == "ipywidgets" else TROUBLE, f"pip install {' '.join(ranges)}"
    )


def _lab_slides(version: str) -> Check:
    """ipywidgets 7 beside a part for JupyterLab that was made for 8 shows no slider; Colab has a front end of its own."""
    part = version_of("jupyterlab_widgets")
    if version.startswith("7.") and part and not part.startswith("1.") and not place():
        return Check(
            "ipywidgets",
            f"{version}; it shows no slider beside jupyterlab_widgets {part}",
            WARNING,
            'pip install "jupyterlab_widgets<2" "widgetsnbextension<4"',
        )
    return Check("ipywidgets", version)


def _gpu() -> Check:
    try:
        import torch
    except Exception as error:
        return Check(
            "GPU",
            f"torch cannot be imported: {_brief(error)}",
            TROUBLE,
            "pip install --force-reinstall torch",
        )
    if torch.cuda.is_available():
        return _cuda(torch)
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Check(
            "GPU",
            "there is an NVIDIA driver, but torch is a build without CUDA",
            WARNING,
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
        )
    return Check("GPU", "none, so the bundled models are used", OK, _GPUS.get(place(), ""))


def _cuda(torch) -> Check:
    name, total = (
        torch.cuda.get_device_name(),
        torch.cuda.get_device_properties(0).total_memory / _GB,
    )
    several = f"{torch.cuda.device_count()} × " * (torch.cuda.device_count() > 1)
    for dtype in (
        torch.float16,
        torch.float32,
    ):  # pictures are drawn in the first, a LoRA learns in both
        try:
            _convolve(torch, dtype)
        except Exception as error:  # a build of torch, and the cuDNN beside it, have code for some generations of GPUs only
            return Check(
                "GPU",
                f"{name} cannot do a convolution in {str(dtype).removeprefix('torch.')} with torch "
                f"{torch.__version__}: {_brief(error)}",
                TROUBLE,
                _GPUS.get(place(), _OLDER_GPUS),
            )
    found = f"{several}{name}, {total:.0f} GB, {torch.cuda.mem_get_info()[0] / _GB:.0f} free"
    return (
        Check("GPU", found)
        if total > _SMALL_GPU
        else Check("GPU", found, WARNING, "lb.load_pipeline(low_memory=True)")
    )


def _convolve(torch, dtype) -> None:
    """What a UNet and a VAE do most; an addition alone also works where cuDNN has no code for this GPU."""
    pictures, weights = (
        torch.ones(shape, device="cuda", dtype=dtype) for shape in ((1, 4, 8, 8), (4, 4, 3, 3))
    )
    torch.nn.functional.conv2d(pictures, weights, padding=1).sum().item()


def _disk() -> Check:
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / _GB
    if free > _SMALL_DISK:
        return Check("disk", f"{free:.0f} GB free")
    return Check(
        "disk",
        f"{free:.1f} GB free; Stable Diffusion 1.5 takes 6",
        TROUBLE if free < _FULL_DISK else WARNING,
        "hf cache delete, or set HF_HOME to a folder on a larger disk",
    )


def _torchao() -> Check:
    if why := bad_torchao():
        return Check("torchao", why, TROUBLE, "pip uninstall -y torchao")
    return Check("torchao", version_of("torchao") or "not there, and not needed")


def _lora() -> Check:
    name = "a LoRA by peft"
    try:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        tiny = torch.nn.Sequential(torch.nn.Linear(4, 3))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), tiny)
        tiny(torch.zeros(1, 4))
    except Exception as error:
        mend = (
            "pip uninstall -y torchao" if bad_torchao() else "pip install --upgrade peft accelerate"
        )
        return Check(name, f"cannot be put on a layer: {_brief(error)}", TROUBLE, mend)
    return Check(name, "put on a layer of 4 × 3")


def _pipeline() -> Check:
    try:
        from diffusers import StableDiffusionPipeline
    except Exception as error:
        return Check(
            "a pipeline by diffusers",
            f"cannot be imported: {_brief(error)}",
            TROUBLE,
            "pip install --upgrade diffusers transformers",
        )
    return Check("a pipeline by diffusers", StableDiffusionPipeline.__name__)


def _token() -> Check:
    """Whether there is a token, and where a secret was refused, why; nothing of the token itself."""
    try:
        from huggingface_hub import get_token

        there = get_token()
    except Exception:  # the packages' own lines tell what is wrong with them
        there = os.environ.get("HF_TOKEN")
    kept, refusal = secret("HF_TOKEN")
    if there or kept:
        return Check("Hub token", "there, not shown")
    return Check(
        "Hub token",
        "none; only sharing and gated models need one" + f" ({refusal})" * bool(refusal),
        OK,
        "" if refusal else "hf auth login",
    )
