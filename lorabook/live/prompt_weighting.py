"""Emphasis in prompts by A1111's arithmetic: `(word)`, `(word:1.4)`, `[word]`, BREAK, any size."""

import re
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import scale_lora_layers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorabook.live.state import preserve_scales
from lorabook.upstream import execution_device

STRONGER = 1.1  # what a pair of brackets multiplies or divides by
NEAR = 20  # tokens before the end of a full chunk in which a comma is where to break
LONGEST = 100_000  # tokens
_TOKEN = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_COMPOSED = re.compile(r"\bAND\b")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_EDITING = re.compile(r"\||:\s*[+-]?[\d.]+(e[+-]?\d+)?\s*$", re.IGNORECASE)

Chunk = list[tuple[int, float]]  # tokens and their weights, without those that begin and end it
Encoder = tuple[PreTrainedTokenizerBase, nn.Module]


def parse_emphasis(prompt: str) -> list[list[tuple[str, float]]]:
    """The texts of a prompt and their weights, in the parts that BREAK makes.

    Round brackets multiply by 1.1, square ones divide by it, `(text:1.4)` multiplies by 1.4, all as
    deep as they nest; one that is never closed acts to the end. A backslash makes a bracket a
    letter. ValueError for prompt editing ([from:to:when], [one|other]) and composed prompts.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py.
    """
    _check_syntax(prompt)
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in _weighted(prompt) or [["", 1.0]]:
        if text is None:
            parts.append([])
            continue
        if parts[-1] and parts[-1][-1][1] == weight:
            text = parts[-1].pop()[0] + text
        parts[-1].append((text, weight))
    return parts


def encode(
    pipe: DiffusionPipeline,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    guided: bool = True,
    clip_skip: int | None = None,
    lora_scale: float | None = None,
) -> dict[str, Tensor]:
    """A prompt with emphasis as a pipeline's own arguments, each (1, chunks · 77, width).

    Without emphasis they are those of `encode_prompt`, to the bit. Every 75 tokens are encoded by
    themselves, multiplied by their weights and brought back to the mean they had; the shorter of
    the two prompts goes on with empty chunks. SDXL's pooled vectors (1, width) are those of the
    first chunk. Where the call is not guided, the negative prompt is not encoded.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_hijack_clip.py and sd_emphasis.py.
    """
    encoders = _encoders(pipe)
    prompts = _chunked(pipe, prompt, negative_prompt, guided)
    length = max(len(chunks) for prompt in prompts.values() for chunks in prompt)
    zeros = negative_prompt is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    embeddings = {}
    with torch.no_grad(), nullcontext() if lora_scale is None else preserve_scales(pipe):
        for _, model in encoders if lora_scale is not None else []:
            scale_lora_layers(model, lora_scale)
        for name, chunks_by_encoder in prompts.items():
            if name == "negative_prompt" and zeros:
                for key in [*embeddings]:
                    embeddings[f"negative_{key}"] = torch.zeros_like(embeddings[key])
                continue
            hidden, pooled = [], None
            for encoder, chunks in zip(encoders, chunks_by_encoder, strict=True):
                chunks = chunks + [[]] * (length - len(chunks))
                skip = clip_skip if name == "prompt" else None
                encoded = [_encode_chunk(pipe, *encoder, chunk, skip) for chunk in chunks]
                hidden.append(torch.cat([states for states, _ in encoded], dim=1))
                pooled = encoded[0][1]
            embeddings[f"{name}_embeds"] = torch.cat(hidden, dim=-1).to(encoders[-1][1].dtype)
            if pooled is not None:
                embeddings[name.replace("prompt", "pooled_prompt_embeds")] = pooled
    return embeddings


def chunk_count(
    pipe: DiffusionPipeline, prompt: str, negative_prompt: str | None = None, *, guided: bool = True
) -> int:
    """How many chunks of 77 tokens `encode` makes of these."""
    prompts = _chunked(pipe, prompt, negative_prompt, guided)
    return max(len(chunks) for prompt in prompts.values() for chunks in prompt)


def _check_syntax(prompt: str) -> None:
    """Refuse what A1111 knows beside emphasis: prompt editing and composed prompts."""
    # an escaped bracket is a letter; everything keeps its place
    text = re.sub(r"\\.", "  ", prompt, flags=re.DOTALL)
    while match := _INNERMOST.search(text):
        if _EDITING.search(match[1]):
            raise ValueError(
                f"the prompt's {prompt[match.start() : match.end()]!r:.120} is prompt editing, "
                "which is not known; emphasis is: (word), (word:1.4), [word]"
            )
        text = f"{text[: match.start()]} {match[1]} {text[match.end() :]}"
    if match := _COMPOSED.search(prompt):
        near = prompt[max(0, match.start() - 50) : match.end() + 50].strip()
        raise ValueError(
            f"the prompt's {near!r} is a composed prompt, which is not known; write «and» for the "
            "word, or BREAK to keep the parts in chunks of their own"
        )


def _weighted(prompt: str) -> list[list]:
    """[text, weight] in their order; the text is None where BREAK begins a new part."""
    runs: list[list] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for run in runs[open_at[bracket].pop() :]:
            run[1] *= factor

    for match in _TOKEN.finditer(prompt):
        text = match[0]
        if text in open_at:
            open_at[text].append(len(runs))
        elif match["weight"] and open_at["("]:
            close("(", _weight(text, match["weight"]))
        elif text == ")" and open_at["("]:
            close("(", STRONGER)
        elif text == "]" and open_at["["]:
            close("[", 1 / STRONGER)
        elif text.startswith("\\"):
            runs.append([text[1:], 1.0])
        else:
            first, *others = _BREAK.split(text)
            runs.append([first, 1.0])
            for part in others:
                runs += [[None, 1.0], [part, 1.0]]
    for bracket, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        while open_at[bracket]:
            close(bracket, factor)
    return runs


def _weight(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(f"the prompt's {text!r:.120} has a weight that is no number") from None


def _encoders(pipe: DiffusionPipeline) -> list[Encoder]:
    """Tokenizer and text encoder, or both of both, of a Stable Diffusion or SDXL pipeline."""
    kind = type(pipe).__name__
    if getattr(pipe, "unet", None) is None or hasattr(pipe, "text_encoder_3"):
        raise ValueError(
            f"emphasis is for Stable Diffusion and SDXL pipelines, not {kind}; give a plain prompt"
        )
    encoders = [
        (getattr(pipe, f"tokenizer{number}", None), getattr(pipe, f"text_encoder{number}", None))
        for number in ("", "_2")
    ]
    encoders = [(tokenizer, model) for tokenizer, model in encoders if model is not None]
    if not encoders:
        raise ValueError(f"this {kind} was loaded without a text encoder; load it with one")
    return encoders


def _chunked(
    pipe: DiffusionPipeline, prompt: str, negative_prompt: str | None, guided: bool
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


def _chunks(
    pipe: DiffusionPipeline, prompt: str, tokenizer: PreTrainedTokenizerBase
) -> list[Chunk]:
    """A prompt's tokens in chunks of at most 75."""
    chunks: list[Chunk] = []
    comma, size = tokenizer.get_vocab().get(",</w>"), tokenizer.model_max_length - 2
    for part in parse_emphasis(prompt):
        tokens = []
        for text, weight in part:
            if any(word in text for word in tokenizer.added_tokens_encoder):
                # a textual inversion of several vectors is as many words
                text = pipe.maybe_convert_prompt(text, tokenizer)
            # without a length of its own the tokenizer would warn of what is split below
            settings = {"add_special_tokens": False, "truncation": True, "max_length": LONGEST}
            tokens += [(token, weight) for token in tokenizer(text, **settings).input_ids]
        chunks += _split(tokens, size, comma)
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def _split(tokens: Chunk, size: int, comma: int | None) -> Iterator[Chunk]:
    """Chunks of at most `size`, each ending behind a comma where one of its last tokens is one."""
    while len(tokens) > size:
        end = size
        if tokens[size][0] != comma:
            behind_commas = (i for i in range(size, size - NEAR, -1) if tokens[i - 1][0] == comma)
            end = next(behind_commas, size)
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _encode_chunk(
    pipe: DiffusionPipeline,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    chunk: Chunk,
    clip_skip: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The hidden states of a chunk (1, 77, width), weighted, and its pooled vector (1, width)."""
    empty = tokenizer.model_max_length - 2 - len(chunk)
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * empty
    output = model(torch.tensor([ids], device=execution_device(pipe)), output_hidden_states=True)
    # SDXL counts from the last layer but one, and without the final norm
    is_sdxl = hasattr(pipe, "text_encoder_2")
    hidden = output.hidden_states[-(1 + is_sdxl + (clip_skip or 0))]
    if not is_sdxl and clip_skip is None:
        hidden = output[0]
    elif not is_sdxl:
        hidden = getattr(model, "text_model", model).final_layer_norm(hidden)
    pooled = output[0] if is_sdxl and output[0].dim() == 2 else None
    weights = [1.0, *(weight for _, weight in chunk), 1.0] + [1.0] * empty
    if set(weights) == {1.0}:
        return hidden, pooled
    exact = hidden.float()
    changed = exact * exact.new_tensor(weights)[None, :, None]
    return (changed * (exact.mean() / changed.mean())).to(hidden.dtype), pooled
