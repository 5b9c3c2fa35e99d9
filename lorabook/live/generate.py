"""A picture from a prompt in A1111's syntax, and what a pipeline's call is told: prompts read the same way everywhere."""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorabook.checks import nearest
from lorabook.live.layers import adapter_names, models_of, module_name
from lorabook.live.load import load_adapter
from lorabook.live.manage import remove_adapter
from lorabook.live.prompt_syntax import find_adapters, merged, parse_prompt
from lorabook.live.prompt_weighting import chunk_count, encode, parse_emphasis
from lorabook.live.scales import set_scales
from lorabook.live.state import locked, preserve_scales
from lorabook.worlds import bundled

_MADE = re.compile("(negative_|pooled_)*prompt")  # arguments that come from the two prompts
OTHER_PROMPTS = (
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)  # texts for one text encoder of several


def check_prompt(prompt, what: str, instead: str) -> str:
    """A prompt for a place where the scales are set otherwise: emphasis is checked, and no adapter is named.

    Args:
        what: "prompt" or "negative_prompt", for errors.
        instead: of an adapter's phrase, where to say its scale; {name} and {weight} stand for its own.
    Raises: ValueError, naming the phrase, for what `parse_prompt` or `parse_emphasis` cannot read, or an adapter's phrase.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a {what} is a text, not {prompt!r:.80}")
    text, mentions = parse_prompt(prompt)
    if mentions:
        one = mentions[0]
        raise ValueError(
            f"the prompt's {one.phrase!r:.90} is not read here: take it out and "
            f"{instead.format(name=one.name[:40], weight=f'{one.unet:g}')}"
        )
    parse_emphasis(text)
    return text


def is_plain(pipe, prompt: str) -> bool:
    """Whether the pipeline itself encodes a prompt as `encode` does: no syntax, and no more than it takes at once."""
    return (
        parse_emphasis(prompt) == [[(prompt, 1.0)]] and chunk_count(pipe, prompt, guided=False) == 1
    )


def words_of(prompt: str) -> str:
    """A prompt's words without its syntax."""
    return " ".join("".join(text for text, _ in part) for part in parse_emphasis(prompt))


def takes_embeddings(pipe, call: Mapping[str, object]) -> bool:
    """Whether a call takes embeddings for its prompts: of pipelines with one or two CLIPs, Stable Diffusion's and SDXL's."""
    takes = (
        inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    )
    return (
        "do_classifier_free_guidance" in takes
        and "clip_skip" in takes
        and "prompt_3" not in takes
        and getattr(pipe, "unet", None) is not None
        and not set(OTHER_PROMPTS) & call.keys()
    )


def prompt_arguments(
    pipe, prompt: str, negative_prompt: str | None, call: Mapping[str, object]
) -> dict[str, object]:
    """The prompts as a pipeline's call takes them: its embeddings, or where those cannot be made apart, the texts.

    Args:
        prompt, negative_prompt: texts without adapters' phrases; None is what it is to the pipeline.
        call: the other arguments (guidance_scale, clip_skip, cross_attention_kwargs …); one of `OTHER_PROMPTS` among them, which
            only a text can stand beside.
    Raises: ValueError as `encode`; for another kind of pipeline also where a prompt weighs words.
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
    texts = {"prompt": prompt, "negative_prompt": negative_prompt} | {
        key: call[key] for key in OTHER_PROMPTS if key in call
    }
    return {name: None if text is None else _unweighted(pipe, text) for name, text in texts.items()}


def chunks_of(pipe, prompt: str, negative_prompt: str | None, call: Mapping[str, object]) -> int:
    """How many chunks of tokens a call's prompts take; only those that take as many can share a pass."""
    if not takes_embeddings(pipe, call):
        return 1
    return chunk_count(pipe, prompt, negative_prompt, guided=is_guided(pipe, call))


def step_count(pipe, call: Mapping[str, object]) -> int:
    """How many denoising steps a call takes."""
    own = call.get("timesteps") or call.get("sigmas")
    return (
        len(own)
        if own
        else call.get("num_inference_steps", _usual(pipe, "num_inference_steps", 50))
    )


def is_guided(pipe, call: Mapping[str, object]) -> bool:
    """Whether a call draws with the negative prompt too."""
    scale, unet = (
        call.get("guidance_scale", _usual(pipe, "guidance_scale", 1)),
        getattr(pipe, "unet", None),
    )
    return scale > 1 and getattr(getattr(unet, "config", None), "time_cond_proj_dim", None) is None


def _usual(pipe, name: str, otherwise):
    """What a pipeline's call takes where it is not told."""
    found = inspect.signature(type(pipe).__call__).parameters.get(name)
    return otherwise if found is None else found.default


def check_call(pipe, call: Mapping[str, object], who: str, texts: Sequence[str] = ()) -> None:
    """Raise ValueError for an argument that the pipeline does not know, and would pass over, or that the prompts make.

    Args:
        who: what hands the arguments on, for the error.
        texts: those of `OTHER_PROMPTS` that it hands on too.
    """
    known = [
        name
        for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        if name in texts
        or name != "self"
        and not _MADE.match(name)
        and parameter.kind is not parameter.VAR_KEYWORD
    ]
    for name in call:
        if name not in known:
            raise ValueError(
                f"{who} hands on no {name!r} to {type(pipe).__name__}; {nearest(name, known)}"
            )


def _unweighted(pipe, prompt: str) -> str:
    parts = parse_emphasis(prompt)
    if len(parts) > 1 or any(weight != 1 for _, weight in parts[0]):
        raise ValueError(
            f"{type(pipe).__name__} weighs no words and knows no BREAK, which the prompt {prompt!r:.100} asks "
            "for; take the brackets out, or write \\( and \\) for brackets that are meant"
        )
    return parts[0][0][0]


@locked
def generate(
    pipe,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    adapters_folder=None,
    seed: int | None = None,
    **call,
):
    """Draw a prompt in A1111's syntax: `a (red:1.3) cat, [blurry] <lora:ink:0.8>`.

    The adapters that either prompt names (see `parse_prompt`) are taken from the pipeline where it has them, else from the
    folder, and act on both prompts; emphasis is A1111's (see `encode`). Afterwards the pipeline is as it was, after an
    error too: what was loaded is taken off, scales and state are back. Unlike in A1111, adapters that are on the pipeline
    and not named keep taking part as they do.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline.
        prompt, negative_prompt: texts.
        adapters_folder: where the named adapters are (see `find_adapters`); None is lorabook's own, of tiny-sd.
        seed: of the noise, which is drawn on the CPU; None leaves it to chance or to a `generator`.
        **call: the pipeline's own arguments (num_inference_steps, guidance_scale, clip_skip …).
    Returns: what the pipeline returns.
    Raises: ValueError for a phrase that cannot be parsed, or an adapter that does not fit; FileNotFoundError for one that
        is not found, with the nearest names. Nothing is drawn then.
    """
    check_call(pipe, call, "generate")
    if seed is not None and "generator" in call:
        raise ValueError("both seed and generator say which noise to draw; give one of them")
    prompt, mentions = parse_prompt(_text("prompt", prompt))
    if negative_prompt is not None:
        negative_prompt, more = parse_prompt(_text("negative_prompt", negative_prompt))
        mentions = mentions + more
    for text in (prompt, negative_prompt or ""):
        parse_emphasis(text)  # what is wrong with it is better said before anything is loaded
    if seed is not None:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    family = "sdxl" if "text_encoder_2" in models_of(pipe) else "sd"
    scales = {
        name: mention.scales(family, step_count(pipe, call))
        for name, mention in merged(mentions).items()
    }
    missing = _missing(pipe, scales, adapters_folder)
    with preserve_scales(pipe):
        try:
            for name, path in missing.items():
                load_adapter(pipe, path, name)
            set_scales(pipe, {module_name(name): asked for name, asked in scales.items()})
            embeddings = encode(
                pipe,
                prompt,
                negative_prompt,
                guided=is_guided(pipe, call),
                clip_skip=call.get("clip_skip"),
                lora_scale=(call.get("cross_attention_kwargs") or {}).get("scale"),
            )
            return pipe(**embeddings, **call)
        finally:
            for name in adapter_names(pipe):
                if name in map(module_name, missing):
                    remove_adapter(pipe, name)


def _text(what: str, prompt) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"generate draws one {what}, a text, not {prompt!r:.100}")
    return prompt


def _missing(pipe, names, folder) -> dict[str, Path]:
    """The files of the adapters that the pipeline does not have."""
    there = adapter_names(pipe)
    wanted = [name for name in names if module_name(name) not in there]
    if not wanted:
        return {}
    folder = bundled("adapters") if folder is None else folder
    found = find_adapters(folder)
    for name in wanted:
        if name not in found:
            raise FileNotFoundError(
                f"the prompt names an adapter {name!r}, which is neither on the pipeline nor in "
                f"{Path(folder).absolute()}; {nearest(name, [*there, *found])}"[:400]
            )
    return {name: found[name] for name in wanted}
