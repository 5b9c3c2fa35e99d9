"""Why an adapter does not fit a pipeline: a sentence with the layers that are not there, the likeliest cause, the remedy."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorabook.live.architecture import family, is_another
from lorabook.live.layers import COMPONENTS, models_of
from lorabook.lora.adapter import Adapter

_LONGEST, _SHORTEST = 400, 24  # letters of a sentence, and of a layer's name in it
# layers as diffusers and transformers name them; any other name is of a form that is not read
_USUAL = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets|(down|up)samplers|motion_modules)\.\d+\..+"
    r"|mid_block\.(attentions|resnets)\.\d+\..+|(time|add)_embedding\.linear_\d|conv_(in|out)"
    r"|text_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)|text_projection"
)


def misfit(pipe, adapter: Adapter, lost: Sequence[tuple[str, str]], where: str) -> str:
    """The sentence for an adapter some of whose layers a pipeline lacks.

    Args:
        lost: component and module of these layers.
        where: what to call the adapter.
    """
    models = models_of(pipe)
    absent = [part for part in adapter.layers if part not in models]
    rest = [part for part in adapter.layers if part in models]
    if (
        rest
        and {part for part, _ in lost} <= set(absent)
        and all(hasattr(pipe, part) for part in absent)
    ):
        cannot = any(part not in COMPONENTS for part in absent)
        return (
            f"{where} has layers for {' and '.join(absent)}, which this pipeline lacks"
            f"{' or adapters cannot be put on' * cannot}; load the rest of it with components={rest}"
        )
    total = sum(map(len, adapter.layers.values()))
    there = total - len(lost)
    count = (
        f"only {there} of its {total} layers are there"
        if there
        else f"none of its {total} layers is there"
    )
    names = [
        adapter.stems.get(place, ".".join(place))
        for place in (lost[0], lost[len(lost) // 2], lost[-1])
    ]
    cause = other_model(adapter, pipe, [module for _, module in lost], rest=rest)
    head = f" does not fit {type(pipe).__name__}: {count}, {'not ' * bool(there)}for example "
    return _short(where, head, list(dict.fromkeys(names)), f"; {cause}")


def other_model(
    adapter: Adapter, pipe, lost: Sequence[str] = (), rest: Sequence[str] = ("unet",)
) -> str:
    """The likeliest cause of a misfit, and its remedy.

    Args:
        lost: modules that the pipeline lacks; none where shapes differ.
        rest: the adapter's components that the pipeline has.
    """
    base = f" ({adapter.base_model:.40})" if adapter.base_model else ""
    if is_another(adapter, pipe):
        return f"it was made for {family(adapter)}{base}, this is {family(pipe)}; load it onto its own base model"
    if not rest:
        return f"this pipeline has no {' and no '.join(adapter.layers)}; load one that has"
    if all(_USUAL.fullmatch(module) for module in lost):
        return (
            f"both are {family(pipe)}, but this one is smaller or otherwise built; load it onto the model that it was "
            f"made for{base}"
        )
    return (
        f"it seems to be for {family(pipe)}, as this is, so its keys are of a form that is not read, perhaps a newer "
        "one; get it in diffusers' own form"
    )


def _short(where: str, head: str, names: list[str], tail: str) -> str:
    """The sentence with as many of the names, as they stand in the file, as it has room for, two at least."""
    for start in (where, Path(where).name[-60:]):
        for count in range(len(names), min(len(names), 2) - 1, -1):
            text = start + head + ", ".join(names[:count]) + tail
            if len(text) <= _LONGEST:
                return text
    room = max((_LONGEST - len(start + head + tail) - 2) // min(len(names), 2), _SHORTEST)
    return (
        start
        + head
        + ", ".join(name if len(name) <= room else f"{name[: room - 1]}…" for name in names[:2])
        + tail
    )
