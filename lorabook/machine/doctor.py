"""Is this machine fit for the book, and what mends it: `lb.doctor()` and `lorabook doctor`."""

import os
import shutil
import sys
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
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
_TORCH = "pip install --force-reinstall torch"
_WHEELS = "--index-url https://download.pytorch.org/whl"
_PYTHON = (3, 11)
_GB = 1e9
_SMALL_GPU, _FULL_DISK, _SMALL_DISK = 6, 1, 8  # GB; Stable Diffusion 1.5 is a download of 5.5 GB

# One thing that was looked at: its name, what was found, "ok", "warning" or "trouble", and the
# command or click that mends it.
Check = namedtuple("Check", "name found verdict mend", defaults=(OK, ""))


class Checkup(tuple):
    """The checks of `doctor`, by number or name; shows itself, also where no package is there."""

    def __getitem__(self, index):
        if isinstance(index, str):
            return next(check for check in self if check.name == index)
        return super().__getitem__(index)

    @property
    def fit(self) -> bool:
        """Whether nothing is in trouble."""
        return all(check.verdict != TROUBLE for check in self)

    @property
    def table(self):
        """The checks as a pandas DataFrame."""
        from pandas import DataFrame

        return DataFrame(list(self), columns=Check._fields)

    def as_dict(self) -> dict:
        """The same as plain data, as `lorabook doctor --json` prints it."""
        return {"fit": self.fit, "checks": [check._asdict() for check in self]}

    def _summary(self) -> str:
        counts = Counter(check.verdict for check in self)
        parts = [f"{kind}: {counts[kind]}" for kind in (TROUBLE, WARNING) if counts[kind]]
        return ", ".join(parts) or "all is well"

    def __str__(self):
        return f"{as_text(_HEADS, self)}\n{self._summary()}"

    __repr__ = __str__

    def _repr_html_(self):
        return f"{as_html(_HEADS, self)}<p>{self._summary()}</p>"


def doctor() -> Checkup:
    """Look at all that lorabook needs, and say what mends what is wrong.

    It looks at Python, the packages and how they suit each other, the GPU, the disk, and whether a
    LoRA can be made. It never raises, shows no token and changes nothing.

    Returns:
        A check a line, with a verdict and what mends it.
    """
    if _python().verdict == TROUBLE:
        return Checkup([_python()])  # everything else waits for it
    packages = [
        _safely(need.name, lambda need=need: _package(need.name, misfits(need)))
        for need in requirements()
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
    """A check, or what went wrong in it: a broken installation is to be told in the table, too."""
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
    state = f"{version}; lorabook needs {wanted} or newer"
    return Check("Python", state, TROUBLE, f"make lab PYTHON=python{wanted}")


def _package(name: str, wrong: Sequence[Misfit]) -> Check:
    version = version_of(name)
    if not wrong:
        return _ipywidgets(version) if name == "ipywidgets" else Check(name, version)
    ranges = [f'"{misfit.requirement.name}{misfit.requirement.specifier}"' for misfit in wrong]
    reason = str(wrong[0])
    if wrong[0].whose == "lorabook":  # its version stands there already
        reason = f"lorabook needs {wrong[0].requirement.specifier}"
        reason += f" ({_WHY[name]})" if name in _WHY and version else ""
    verdict = WARNING if name == "ipywidgets" else TROUBLE
    mend = f"pip install {' '.join(dict.fromkeys(ranges))}"
    return Check(name, f"{version or 'not there'}; {reason}", verdict, mend)


def _ipywidgets(version: str) -> Check:
    """ipywidgets 7 shows no slider beside JupyterLab's part for 8; Colab has its own."""
    part = version_of("jupyterlab_widgets")
    if not version.startswith("7.") or not part or part.startswith("1.") or place():
        return Check("ipywidgets", version)
    state = f"{version}; it shows no slider beside jupyterlab_widgets {part}"
    mend = 'pip install "jupyterlab_widgets<2" "widgetsnbextension<4"'
    return Check("ipywidgets", state, WARNING, mend)


def _gpu() -> Check:
    try:
        import torch
    except Exception as error:
        return Check("GPU", f"torch cannot be imported: {_brief(error)}", TROUBLE, _TORCH)
    if torch.cuda.is_available():
        return _cuda(torch)
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        state = "there is an NVIDIA driver, but torch is a build without CUDA"
        return Check("GPU", state, WARNING, f"{_TORCH} {_WHEELS}/cu128")
    return Check("GPU", "none, so the bundled models are used", OK, _GPUS.get(place(), ""))


def _cuda(torch) -> Check:
    name = torch.cuda.get_device_name()
    # images are generated in the first, a LoRA learns in both
    for dtype in (torch.float16, torch.float32):
        try:
            # a sum also works where torch, or the cuDNN beside it, has no code for this GPU
            images = torch.ones((1, 4, 8, 8), device="cuda", dtype=dtype)
            weights = torch.ones((4, 4, 3, 3), device="cuda", dtype=dtype)
            torch.nn.functional.conv2d(images, weights, padding=1).sum().item()
        except Exception as error:
            state = (
                f"{name} cannot do a convolution in {str(dtype).removeprefix('torch.')} with torch "
                f"{torch.__version__}: {_brief(error)}"
            )
            return Check("GPU", state, TROUBLE, _GPUS.get(place(), f"{_TORCH} {_WHEELS}/cu126"))
    count, total = torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory / _GB
    free = torch.cuda.mem_get_info()[0] / _GB
    state = f"{f'{count} × ' * (count > 1)}{name}, {total:.0f} GB, {free:.0f} free"
    if total > _SMALL_GPU:
        return Check("GPU", state)
    return Check("GPU", state, WARNING, "lb.load_pipeline(low_memory=True)")


def _disk() -> Check:
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / _GB
    if free > _SMALL_DISK:
        return Check("disk", f"{free:.0f} GB free")
    state = f"{free:.1f} GB free; Stable Diffusion 1.5 takes 6"
    mend = "hf cache delete, or set HF_HOME to a folder on a larger disk"
    return Check("disk", state, TROUBLE if free < _FULL_DISK else WARNING, mend)


def _torchao() -> Check:
    if reason := bad_torchao():
        return Check("torchao", reason, TROUBLE, "pip uninstall -y torchao")
    return Check("torchao", version_of("torchao") or "not there, and not needed")


def _lora() -> Check:
    name = "a LoRA by peft"
    try:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
        model(torch.zeros(1, 4))
    except Exception as error:
        torchao = "pip uninstall -y torchao" if bad_torchao() else ""
        mend = torchao or "pip install --upgrade peft accelerate"
        return Check(name, f"cannot be put on a layer: {_brief(error)}", TROUBLE, mend)
    return Check(name, "put on a layer of 4 × 3")


def _pipeline() -> Check:
    name = "a pipeline by diffusers"
    try:
        from diffusers import StableDiffusionPipeline
    except Exception as error:
        mend = "pip install --upgrade diffusers transformers"
        return Check(name, f"cannot be imported: {_brief(error)}", TROUBLE, mend)
    return Check(name, StableDiffusionPipeline.__name__)


def _token() -> Check:
    """Whether there is a token, or why a secret was refused; nothing of the token itself."""
    try:
        from huggingface_hub import get_token

        token = get_token()
    except Exception:  # the packages' own lines tell what is wrong with them
        token = os.environ.get("HF_TOKEN")
    value, refusal = secret("HF_TOKEN")
    if token or value:
        return Check("Hub token", "there, not shown")
    state = "none; only sharing and gated models need one" + f" ({refusal})" * bool(refusal)
    return Check("Hub token", state, OK, "" if refusal else "hf auth login")
