"""Emphasis in prompts, with A1111's arithmetic: `(word)`, `(word:1.4)`, `[word]`, `BREAK`, and prompts of any length."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

STRONGER = 1.1  # what a pair of brackets multiplies or divides by
NEAR = 20  # tokens before the end of a full chunk in which a comma is where to break
LONGEST = 100_000  # tokens
_TOKEN = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_COMPOSED = re.compile(r"\bAND\b")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_EDITING = re.compile(r"\||:\s*[+-]?[\d.]+(e[+-]?\d+)?\s*$", re.IGNORECASE)

Chunk = list[tuple[int, float]]  # tokens and their weights, without those that begin and end it
Hidden = tuple[Tensor, Tensor | None]  # what a text encoder says of a chunk, and its pooled vector


def parse_emphasis(prompt: str) -> list[list[tuple[str, float]]]:
    """The texts of a prompt and their weights, in the parts that BREAK makes.

    Round brackets multiply by 1.1, square ones divide by it, `(text:1.4)` multiplies by 1.4, all as deep as they nest; one
    that is never closed acts to the end. A backslash makes a bracket a letter.

    Args:
        prompt: without adapters' phrases.
    Returns: a list for each part, of (text, weight); neighbours of the same weight are one.
    Raises: ValueError for a weight that is no number, for prompt editing ([from:to:when], [one|other]), and for composed
        prompts (one AND other).
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py.
    """
    if found := _edited(prompt):
        raise ValueError(
            f"the prompt's {found!r:.120} is prompt editing, which changes the prompt while it is drawn; "
            "only emphasis is known: (word), (word:1.4), [word]"
        )
    if found := _COMPOSED.search(prompt):
        near = prompt[max(0, found.start() - 50) : found.end() + 50].strip()
        raise ValueError(
            f"the prompt's {near!r} is a composed prompt, whose parts beside AND guide one by one; that is not "
            "known: write «and» for the word, or BREAK to keep the parts in chunks of their own"
        )
    runs, breaks = _weighted(prompt)
    parts: list[list[tuple[str, float]]] = [[]]
    for number, (text, weight) in enumerate(runs):
        if number in breaks:
            parts.append([])
        if parts[-1] and parts[-1][-1][1] == weight:
            text = parts[-1].pop()[0] + text
        parts[-1].append((text, weight))
    return parts


def encode(
    pipe,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    guided: bool = True,
    clip_skip: int | None = None,
    lora_scale: float | None = None,
) -> dict[str, Tensor]:
    """A prompt with emphasis as a pipeline's own arguments; without emphasis they are `encode_prompt`'s, to the bit.

    Every 75 tokens are encoded by themselves, multiplied by their weights and brought back to the mean they had; the
    shorter of the two prompts goes on with empty chunks.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline; adapters on its text encoders act.
        prompt, negative_prompt: texts; None is what it is to the pipeline, for SDXL zeros.
        guided: whether the call asks for the negative prompt's too; else it is not encoded.
        clip_skip, lora_scale: as in `encode_prompt`; clip_skip is for the prompt alone, as there.
    Returns: prompt_embeds and, where guided, negative_prompt_embeds of shape (1, chunks · 77, width); for SDXL also
        pooled_prompt_embeds and negative_pooled_prompt_embeds (1, width), those of the first chunk.
    Raises: ValueError for another kind of pipeline or prompt, and as `parse_emphasis`.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_hijack_clip.py and sd_emphasis.py ("Original").
    """
    encoders = _encoders(pipe)
    chunks = _all_chunks(pipe, prompt, negative_prompt, guided)
    length = max(len(one) for both in chunks.values() for one in both)
    zeros = negative_prompt is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    skips = {"prompt": clip_skip, "negative_prompt": None}
    made = {}
    with torch.no_grad(), _scaled((encoder for _, encoder in encoders), lora_scale):
        for name, both in chunks.items():
            if name == "negative_prompt" and zeros:
                made |= {f"negative_{key}": torch.zeros_like(value) for key, value in made.items()}
                continue
            hidden, pooled = zip(
                *(
                    _encoded(pipe, *which, one + [[]] * (length - len(one)), skips[name])
                    for which, one in zip(encoders, both, strict=True)
                ),
                strict=True,
            )
            made[f"{name}_embeds"] = torch.cat(hidden, dim=-1).to(encoders[-1][1].dtype)
            if pooled[-1] is not None:
                made[name.replace("prompt", "pooled_prompt_embeds")] = pooled[-1]
    return made


def chunk_count(
    pipe, prompt: str, negative_prompt: str | None = None, *, guided: bool = True
) -> int:
    """How many chunks of 77 tokens `encode` makes of these."""
    return max(
        len(one)
        for both in _all_chunks(pipe, prompt, negative_prompt, guided).values()
        for one in both
    )


def _all_chunks(
    pipe, prompt: str, negative_prompt: str | None, guided: bool
) -> dict[str, list[list[Chunk]]]:
    """The chunks of each prompt for each tokenizer."""
    texts = {"prompt": prompt} | ({"negative_prompt": negative_prompt or ""} if guided else {})
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a text, not {text!r:.100}")
    return {
        name: [_chunks(pipe, text, tokenizer) for tokenizer, _ in _encoders(pipe)]
        for name, text in texts.items()
    }


def _edited(prompt: str) -> str | None:
    """The first square brackets that hold prompt editing, the innermost looked at first."""
    text = re.sub(
        r"\\.", "  ", prompt, flags=re.DOTALL
    )  # an escaped bracket is a letter; all keeps its place
    while found := _INNERMOST.search(text):
        if _EDITING.search(found[1]):
            return prompt[found.start() : found.end()]
        text = f"{text[: found.start()]} {found[1]} {text[found.end() :]}"
    return None


@contextmanager
def _scaled(encoders, scale: float | None):
    """The text encoders' adapters at a call's own scale, within a block, as `encode_prompt` does it."""
    encoders = list(encoders) if scale is not None else []
    try:
        for encoder in encoders:
            scale_lora_layers(encoder, scale)
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)


def _weighted(prompt: str) -> tuple[list[list], set[int]]:
    """[text, weight] in their order, and the numbers of those that begin a new part."""
    runs: list[list] = []
    breaks: set[int] = set()
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for run in runs[open_at[bracket].pop() :]:
            run[1] *= factor

    for found in _TOKEN.finditer(prompt):
        text = found[0]
        if text in open_at:
            open_at[text].append(len(runs))
        elif found["weight"] and open_at["("]:
            close("(", _weight(text, found["weight"]))
        elif text == ")" and open_at["("]:
            close("(", STRONGER)
        elif text == "]" and open_at["["]:
            close("[", 1 / STRONGER)
        elif text.startswith("\\"):
            runs.append([text[1:], 1.0])
        else:
            first, *others = _BREAK.split(text)
            breaks.update(range(len(runs) + 1, len(runs) + 1 + len(others)))
            runs += [[part, 1.0] for part in (first, *others)]
    for bracket, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        while open_at[bracket]:
            close(bracket, factor)
    return runs or [["", 1.0]], breaks


def _weight(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(f"the prompt's {text!r:.120} has a weight that is no number") from None


def _encoders(pipe) -> list[tuple]:
    """Tokenizer and text encoder, or both of both, of a Stable Diffusion or SDXL pipeline."""
    if getattr(pipe, "unet", None) is None or hasattr(pipe, "text_encoder_3"):
        raise ValueError(
            f"emphasis is for Stable Diffusion and SDXL pipelines, not {type(pipe).__name__}; call that one "
            "with a plain prompt"
        )
    found = [
        (getattr(pipe, f"tokenizer{two}", None), getattr(pipe, f"text_encoder{two}", None))
        for two in ("", "_2")
    ]
    found = [(tokenizer, encoder) for tokenizer, encoder in found if encoder is not None]
    if not found:
        raise ValueError(
            f"this {type(pipe).__name__} was loaded without a text encoder; load it with one"
        )
    return found


def _chunks(pipe, prompt: str, tokenizer) -> list[Chunk]:
    """A prompt's tokens in chunks of at most 75."""
    found: list[Chunk] = []
    comma, size = tokenizer.get_vocab().get(",</w>"), tokenizer.model_max_length - 2
    for part in parse_emphasis(prompt):
        tokens = []
        for text, weight in part:
            if any(word in text for word in tokenizer.added_tokens_encoder):
                text = pipe.maybe_convert_prompt(
                    text, tokenizer
                )  # a textual inversion of several vectors is as many words
            # without a length of its own the tokenizer would warn of what is split below
            ids = tokenizer(
                text, add_special_tokens=False, truncation=True, max_length=LONGEST
            ).input_ids
            tokens += [(token, weight) for token in ids]
        found += _split(tokens, size, comma)
    return found[:-1] if len(found) > 1 and not found[-1] else found


def _split(tokens: Chunk, size: int, comma: int | None) -> Iterator[Chunk]:
    """A full chunk ends behind a comma among its last tokens, where there is one and the text goes on without."""
    while len(tokens) > size:
        end = size
        if tokens[size][0] != comma:
            end = next(
                (i + 1 for i in range(size - 1, size - 1 - NEAR, -1) if tokens[i][0] == comma), size
            )
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _encoded(pipe, tokenizer, encoder, chunks: list[Chunk], clip_skip: int | None) -> Hidden:
    """All of a prompt's chunks behind each other, and the first one's pooled vector."""
    found = [_encode_chunk(pipe, tokenizer, encoder, chunk, clip_skip) for chunk in chunks]
    return torch.cat([hidden for hidden, _ in found], dim=1), found[0][1]


def _encode_chunk(pipe, tokenizer, encoder, chunk: Chunk, clip_skip: int | None) -> Hidden:
    empty = tokenizer.model_max_length - 2 - len(chunk)
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id] + [
        tokenizer.pad_token_id
    ] * empty
    weights = [1.0, *(weight for _, weight in chunk), 1.0] + [1.0] * empty
    said = encoder(torch.tensor([ids], device=pipe._execution_device), output_hidden_states=True)
    large = hasattr(
        pipe, "text_encoder_2"
    )  # SDXL counts from the last layer but one, and without the final norm
    hidden = said.hidden_states[-(1 + large + (clip_skip or 0))]
    if not large:
        hidden = (
            getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
            if clip_skip is not None
            else said[0]
        )
    return _emphasised(hidden, weights), said[0] if large and said[0].dim() == 2 else None


def _emphasised(hidden: Tensor, weights: list[float]) -> Tensor:
    """(1, tokens, width) times a weight for each token, at the mean it had."""
    if set(weights) == {1.0}:
        return hidden
    exact = hidden.float()
    changed = exact * exact.new_tensor(weights)[None, :, None]
    return (changed * (exact.mean() / changed.mean())).to(hidden.dtype)
