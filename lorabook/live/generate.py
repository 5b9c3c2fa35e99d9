"""Images from a prompt in A1111's syntax, and what a pipeline's call is given for a prompt."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from lorabook.checks import nearest
from lorabook.live.layers import adapter_names, module_name
from lorabook.live.load import load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.presets import family_of
from lorabook.live.prompt_syntax import find_adapters, merged, parse_prompt
from lorabook.live.prompt_weighting import chunk_count, encode, parse_emphasis
from lorabook.live.scales import set_scales
from lorabook.live.state import locked, preserve_scales
from lorabook.worlds import bundled

# texts for one text encoder of several
OTHER_PROMPTS = ("prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
_FROM_PROMPTS = re.compile("(negative_|pooled_)*prompt")


@locked
def generate(
    pipe: DiffusionPipeline,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    adapters_folder: str | PathLike | None = None,
    seed: int | None = None,
    **call: Any,
) -> Any:
    """Generate from a prompt in A1111's syntax: `a (red:1.3) cat, [blurry] <lora:ink:0.8>`.

    The adapters that either prompt names (see `parse_prompt`) are taken from the pipeline where it
    has them, else from the folder, and act on both prompts; emphasis is A1111's (see `encode`).
    Afterwards the pipeline is as it was, after an error too. Unlike in A1111, adapters that are on
    the pipeline and not named stay as they are.

    Args:
        pipe: A Stable Diffusion or SDXL pipeline; others take prompts without emphasis.
        prompt: A text.
        negative_prompt: A text.
        adapters_folder: Where the named adapters are (see `find_adapters`); None is lorabook's own.
        seed: Of the noise, which is drawn on the CPU; None leaves it to chance or to a `generator`.
        **call: The pipeline's own arguments (num_inference_steps, guidance_scale, clip_skip …).

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: For a phrase that cannot be parsed, or an adapter that does not fit.
        FileNotFoundError: For an adapter that is not found, with the nearest names.
    """
    check_call(pipe, call, "generate")
    if seed is not None:
        if "generator" in call:
            raise ValueError("both seed and generator say which noise to draw; give one of them")
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    texts, mentions = {"prompt": prompt, "negative_prompt": negative_prompt}, []
    for what, text in texts.items():
        if what == "negative_prompt" and text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"generate draws one {what}, a text, not {text!r:.100}")
        texts[what], more = parse_prompt(text)
        mentions += more
        parse_emphasis(texts[what])  # what is wrong is better said before anything is loaded
    family, steps = family_of(pipe), step_count(pipe, call)
    scales = {name: one.scales(family, steps) for name, one in merged(mentions).items()}
    missing = _missing(pipe, scales, adapters_folder)
    with preserve_scales(pipe):
        try:
            for name, path in missing.items():
                load_adapter(pipe, path, name)
            set_scales(pipe, {module_name(name): value for name, value in scales.items()})
            return pipe(**prompt_arguments(pipe, **texts, call=call), **call)
        finally:
            for name in adapter_names(pipe):
                if name in map(module_name, missing):
                    remove_adapter(pipe, name)


def prompt_arguments(
    pipe: DiffusionPipeline, prompt: str, negative_prompt: str | None, call: Mapping[str, Any]
) -> dict[str, Any]:
    """The prompts as a pipeline's call takes them: embeddings, or texts where it makes them itself.

    One of `OTHER_PROMPTS` in the call stands beside texts only, which weigh no words.
    """
    if takes_embeddings(pipe, call):
        return encode(
            pipe,
            prompt,
            negative_prompt,
            guided=is_guided(pipe, call),
            clip_skip=call.get("clip_skip"),
            lora_scale=(call.get("cross_attention_kwargs") or {}).get("scale"),
        )
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    texts |= {key: call[key] for key in OTHER_PROMPTS if key in call}
    return {name: None if text is None else _unweighted(pipe, text) for name, text in texts.items()}


def check_prompt(prompt: str, what: str, instead: str) -> str:
    """A prompt's text, where scales are set otherwise; ValueError if it names adapters.

    `what` is "prompt" or "negative_prompt"; `instead` says, with {name} and {weight}, where to.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a {what} is a text, not {prompt!r:.80}")
    text, mentions = parse_prompt(prompt)
    for mention in mentions:
        remedy = instead.format(name=mention.name[:40], weight=f"{mention.unet:g}")
        phrase = f"{mention.phrase!r:.90}"
        raise ValueError(f"the prompt's {phrase} is not read here: take it out and {remedy}")
    parse_emphasis(text)
    return text


def check_call(
    pipe: DiffusionPipeline, call: Iterable[str], who: str, texts: Sequence[str] = ()
) -> None:
    """Raise ValueError for an argument that the pipeline does not know, or that the prompts make.

    `texts` are those of `OTHER_PROMPTS` that `who` hands on too.
    """
    parameters = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
    known = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    known = [name for name in known if name in texts or not _FROM_PROMPTS.match(name)]
    for name in call:
        if name not in known:
            raise ValueError(
                f"{who} hands on no {name!r} to {type(pipe).__name__}; {nearest(name, known)}"
            )


def takes_embeddings(pipe: DiffusionPipeline, call: Iterable[str]) -> bool:
    """Whether a call takes embeddings for its prompts: with a UNet and one or two CLIPs."""
    encoding = getattr(pipe, "encode_prompt", None)
    takes = inspect.signature(encoding).parameters if encoding else {}
    return (
        {"do_classifier_free_guidance", "clip_skip"} <= takes.keys()
        and "prompt_3" not in takes
        and getattr(pipe, "unet", None) is not None
        and not set(OTHER_PROMPTS) & set(call)
    )


def is_guided(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> bool:
    """Whether a call uses the negative prompt too."""
    config = getattr(getattr(pipe, "unet", None), "config", None)
    is_distilled = getattr(config, "time_cond_proj_dim", None) is not None
    return _with_defaults(pipe, call).get("guidance_scale", 1) > 1 and not is_distilled


def step_count(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> int:
    """How many denoising steps a call takes."""
    if own := call.get("timesteps") or call.get("sigmas"):
        return len(own)
    return _with_defaults(pipe, call).get("num_inference_steps", 50)


def chunks_of(
    pipe: DiffusionPipeline, prompt: str, negative_prompt: str | None, call: Mapping[str, Any]
) -> int:
    """How many chunks of tokens a call's prompts take; only equal numbers can share a pass."""
    if not takes_embeddings(pipe, call):
        return 1
    return chunk_count(pipe, prompt, negative_prompt, guided=is_guided(pipe, call))


def is_plain(pipe: DiffusionPipeline, prompt: str) -> bool:
    """Whether the pipeline itself encodes a prompt as `encode` does: short, and without syntax."""
    is_short = chunk_count(pipe, prompt, guided=False) == 1
    return is_short and parse_emphasis(prompt) == [[(prompt, 1.0)]]


def words_of(prompt: str) -> str:
    """A prompt's words without its syntax."""
    return " ".join("".join(text for text, _ in part) for part in parse_emphasis(prompt))


def _with_defaults(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | dict(call)


def _unweighted(pipe: DiffusionPipeline, prompt: str) -> str:
    parts = parse_emphasis(prompt)
    if len(parts) > 1 or any(weight != 1 for _, weight in parts[0]):
        raise ValueError(
            f"{type(pipe).__name__} weighs no words and knows no BREAK, as {prompt!r:.100} has; "
            "take the brackets out, or write \\( and \\) for brackets that are meant"
        )
    return parts[0][0][0]


def _missing(
    pipe: DiffusionPipeline, names: Iterable[str], folder: str | PathLike | None
) -> dict[str, Path]:
    """The files of the adapters that the pipeline does not have."""
    present = adapter_names(pipe)
    missing = [name for name in names if module_name(name) not in present]
    if not missing:
        return {}
    folder = bundled("adapters") if folder is None else Path(folder)
    files = find_adapters(folder)
    for name in missing:
        if name not in files:
            raise FileNotFoundError(
                f"the prompt names an adapter {name!r}, which is neither on the pipeline nor in "
                f"{folder.absolute()}; {nearest(name, [*present, *files])}"[:400]
            )
    return {name: files[name] for name in missing}
