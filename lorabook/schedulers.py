"""Schedulers by the names that people know: "ddim", "euler a", "DPM++ 2M Karras"."""

import inspect
import re
from collections.abc import Mapping
from importlib.util import find_spec

import diffusers

# The table is https://huggingface.co/docs/diffusers/api/schedulers/overview; each name sets all of
# its options.
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
SPACINGS = {  # how the noise levels are spaced, which may follow a name
    "karras": {"use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "sgm uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
}
_NO_SPACING = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False
)


def scheduler_named(name: str) -> tuple[type, dict]:
    """The diffusers class of a scheduler, and the options that its name stands for.

    A name is one of `SCHEDULERS` in any case, with one of `SPACINGS` behind it where its class has
    that ("DPM++ 2M Karras"); or a class's own name, which stands for no options.
    """
    base, spacing = _parts(name)
    class_name, options = SCHEDULERS.get(base, (name if isinstance(name, str) else "", {}))
    scheduler = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if scheduler is None:
        raise ValueError(
            f"unknown scheduler {name!r:.60}; the names are: {', '.join(SCHEDULERS)}; behind them "
            f"{', '.join(SPACINGS)}; or a diffusers class"
        )
    takes, levels = inspect.signature(scheduler.__init__).parameters, SPACINGS.get(spacing, {})
    needed = [*getattr(scheduler, "_backends", ()), *["scipy"] * ("use_beta_sigmas" in levels)]
    if missing := [package for package in needed if find_spec(package) is None]:
        raise ValueError(
            f"the scheduler {name!r:.60} needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    if levels and (option := list(levels)[-1]) not in takes:
        raise ValueError(
            f"{base!r} is not drawn with {spacing} levels, since diffusers' {class_name} has "
            f"no {option}; say {base!r}, or take another, as 'dpm++ 2m karras'"
        )
    all_options = {} if base is None else _NO_SPACING | options | levels
    return scheduler, {option: value for option, value in all_options.items() if option in takes}


def scheduler_options(config: Mapping, name: str) -> tuple[type, dict]:
    """`scheduler_named` for a model whose own scheduler has this config.

    DDIM, DDPM and LCM clip to ±1 where a config does not say; latents are not clipped.
    """
    scheduler, options = scheduler_named(name)
    if "clip_sample" in inspect.signature(scheduler.__init__).parameters:
        options.setdefault("clip_sample", config.get("clip_sample", False))
    return scheduler, options


def scheduler_like(config: Mapping, name: str):
    """A scheduler by name, for a model whose own scheduler has this config."""
    scheduler, options = scheduler_options(config, name)
    return scheduler.from_config(config, **options)


def usual_name(name: str) -> str | None:
    """A scheduler's name as `SCHEDULERS` and `SPACINGS` write it; None for a class's own."""
    base, spacing = _parts(name)
    return f"{base} {spacing or ''}".strip() if base else None


def scheduler_name(scheduler) -> str | None:
    """The usual name of a scheduler with its present options, or None where it has none."""
    for spacing in ("", *SPACINGS):
        for base in reversed(SCHEDULERS):
            try:
                kind, options = scheduler_named(f"{base} {spacing}".strip())
            except ValueError:  # its class does not have these noise levels
                continue
            if type(scheduler) is kind and options.items() <= dict(scheduler.config).items():
                return f"{base} {spacing}".strip()
    return None


def _parts(name: str) -> tuple[str | None, str | None]:
    """The entry of `SCHEDULERS` and that of `SPACINGS` which a name means."""
    plain, known = _squeezed(str(name)), {_squeezed(one): one for one in SCHEDULERS}
    spacing = next((one for one in SPACINGS if plain.endswith(_squeezed(one))), None)
    return known.get(plain.removesuffix(_squeezed(spacing or ""))), spacing


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
