"""A picture from a prompt in A1111's syntax, and the pipeline as it was afterwards."""

from pathlib import Path

import torch

from lorabook.live.call import check_call, is_guided, step_count
from lorabook.live.layers import adapter_names, models_of, module_name
from lorabook.live.load import load_adapter
from lorabook.live.locks import locked
from lorabook.live.manage import remove_adapter
from lorabook.live.prompt_syntax import find_adapters, merged, nearest, parse_prompt
from lorabook.live.prompt_weighting import encode, parse_emphasis
from lorabook.live.scales import kept_scales, set_scales
from lorabook.worlds import bundled


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
    with kept_scales(pipe):
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
