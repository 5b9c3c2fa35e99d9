"""What a pipeline's call is told: prompts read the same way for `generate`, `sweep` and the studio, and names it knows."""

import inspect
import re
from collections.abc import Mapping, Sequence

from lorabook.live.prompt_syntax import nearest, parse_prompt
from lorabook.live.prompt_weighting import chunk_count, encode, parse_emphasis

_MADE = re.compile("(negative_|pooled_)*prompt")  # arguments that come from the two prompts
OTHERS = (
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


def encodes_apart(pipe, call: Mapping[str, object]) -> bool:
    """Whether a call takes embeddings for its prompts: of pipelines with one or two CLIPs, Stable Diffusion's and SDXL's."""
    takes = (
        inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    )
    return (
        "do_classifier_free_guidance" in takes
        and "clip_skip" in takes
        and "prompt_3" not in takes
        and getattr(pipe, "unet", None) is not None
        and not set(OTHERS) & call.keys()
    )


def told_prompts(
    pipe, prompt: str, negative_prompt: str | None, call: Mapping[str, object]
) -> dict[str, object]:
    """The prompts as a pipeline's call takes them: its embeddings, or where those cannot be made apart, the texts.

    Args:
        prompt, negative_prompt: texts without adapters' phrases; None is what it is to the pipeline.
        call: the other arguments (guidance_scale, clip_skip, cross_attention_kwargs …); one of `OTHERS` among them, which
            only a text can stand beside.
    Raises: ValueError as `encode`; for another kind of pipeline also where a prompt weighs words.
    """
    if encodes_apart(pipe, call):
        return encode(
            pipe,
            prompt,
            negative_prompt,
            guided=is_guided(pipe, call),
            clip_skip=call.get("clip_skip"),
            lora_scale=(call.get("cross_attention_kwargs") or {}).get("scale"),
        )
    texts = {"prompt": prompt, "negative_prompt": negative_prompt} | {
        key: call[key] for key in OTHERS if key in call
    }
    return {name: None if text is None else _unweighted(pipe, text) for name, text in texts.items()}


def chunks_of(pipe, prompt: str, negative_prompt: str | None, call: Mapping[str, object]) -> int:
    """How many chunks of tokens a call's prompts take; only those that take as many can share a pass."""
    if not encodes_apart(pipe, call):
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
        texts: those of `OTHERS` that it hands on too.
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
