"""The adapters that a prompt names, in A1111's syntax: `<lora:name:weight>`."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorabook.live.presets import TEXT_ENCODERS, from_block_weights, preset
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.types import Scales

KINDS = ("lora", "lyco")
_ARGUMENTS = ("te", "unet", "lbw", "w", "start", "stop", "step")
_REFUSED = {
    "lbwe": "weights of single layers",
    "x": "a weight for the X in block weights",
    "dyn": "another rank",
}
_PHRASE = re.compile(r"<\s*(?P<kind>\w+)(?![\w-])\s*(?P<rest>:[^<>]*)?(?P<end>>?)")
_NAMED_BY_FOLDER = (WEIGHT_NAME, "adapter_model.safetensors")


@dataclass(frozen=True)
class Mention:
    """An adapter as a prompt names it."""

    name: str  # as written
    text_encoder: float = 1.0
    unet: float = 1.0
    blocks: str | tuple[float, ...] | None = None  # a preset's name, or a vector of block weights
    phrase: str = ""  # the whole of it, as written
    # the denoising steps with which it begins to act on the UNet, and with which it ends, counted
    # from 0; between 0 and 1 a share of the steps
    start: float | None = None
    stop: float | None = None

    def scales(self, family: str, steps: int) -> Scales:
        """The scales that the mention asks for, as `set_scales` takes them for one adapter."""
        scales = self._weights(family)
        start = 0 if self.start is None else _whole_step(self.start, steps)
        stop = steps if self.stop is None else _whole_step(self.stop, steps)
        if None not in (self.start, self.stop) and start >= stop:
            raise _phrase_error(
                self.phrase,
                f"with {steps} steps it would end, at {stop}, before it begins, at {start}",
            )
        pauses = ((0.0, min(start / steps, 1.0)), (min(stop / steps, 1.0), 1.0))
        pauses = [[begin, end, 0.0] for begin, end in pauses if begin < end]
        if not pauses:
            return scales
        if not isinstance(scales, dict):
            scales = dict.fromkeys((*TEXT_ENCODERS[family], "unet"), scales)
        return scales | {"steps": pauses}

    def _weights(self, family: str) -> Scales:
        if self.blocks is None and self.text_encoder == self.unet:
            return self.unet
        blocks = dict.fromkeys((*TEXT_ENCODERS[family], "unet"), 1.0)
        if self.blocks is not None:
            blocks = _block_scales(self.blocks, family)
        unet = blocks.pop("unet")
        unet = {"*": self.unet} | unet if isinstance(unet, dict) else self.unet * unet
        return {text: self.text_encoder * scale for text, scale in blocks.items()} | {"unet": unet}


def parse_prompt(prompt: str) -> tuple[str, list[Mention]]:
    """A prompt without the adapters that it names, and these in their order.

    A phrase is `<lora:name>`, `<lora:name:weight>` or `<lora:name:text encoder's weight:unet's>`,
    then `te=`, `unet=`, `lbw=` or `w=` (a vector of block weights or a preset's name), `start=`,
    `stop=` and `step=5-10` (see `Mention`). `lyco` means `lora`. Commas and blanks beside a phrase
    stay, as in A1111. A phrase that cannot be parsed is a ValueError that names it.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/extra_networks.py and
        extensions-builtin/Lora; lbw and steps are those of hako-mikan/sd-webui-lora-block-weight.
    """
    mentions: list[Mention] = []

    def take_out(match: re.Match) -> str:
        is_whole = match["rest"] and match["end"]
        if match["kind"].lower() in KINDS:
            if not is_whole:
                raise _phrase_error(prompt[match.start() :], "it should read <lora:name:weight>")
            try:
                mentions.append(_parse_phrase(match[0], match["rest"][1:].split(":")))
            except ValueError as error:
                raise _phrase_error(match[0], str(error)) from None
            return ""
        if is_whole:
            raise _phrase_error(match[0], f"such a phrase begins with one of: {', '.join(KINDS)}")
        return match[0]

    return _PHRASE.sub(take_out, prompt), mentions


def merged(mentions: Iterable[Mention]) -> dict[str, Mention]:
    """One mention for each name; the weights of an adapter that is named several times add up."""
    by_name: dict[str, Mention] = {}
    for mention in mentions:
        first = by_name.get(mention.name)
        if first is None:
            by_name[mention.name] = mention
            continue
        if (first.blocks, first.start, first.stop) != (mention.blocks, mention.start, mention.stop):
            raise _phrase_error(
                mention.phrase,
                f"{mention.name!r} is named before with other block weights or other steps",
            )
        by_name[mention.name] = replace(
            first,
            text_encoder=first.text_encoder + mention.text_encoder,
            unet=first.unet + mention.unet,
        )
    return by_name


def find_adapters(folder: str | PathLike) -> dict[str, Path]:
    """The adapters in a folder and the folders in it, by every name that a prompt may call them.

    An adapter's name is its file's, or its folder's where the file has diffusers' or PEFT's usual
    name; where two have the same, the path from the folder on ("old/ink"). Kohya's `ss_output_name`
    is a name too where nothing else has it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.absolute()} to look for adapters in")
    files = sorted(
        file
        for file in folder.rglob("*.safetensors")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    first_names, other_names = defaultdict(list), defaultdict(list)
    for file in files:
        name = file.parent.name if file.name in _NAMED_BY_FOLDER else file.stem
        first_names[name].append(file)
        if (trained_as := _trained_as(file)) not in (name, ""):
            other_names[trained_as].append(file)
    adapters = {}
    for name, same in first_names.items():
        for file in same:
            path = file.parent if file.name in _NAMED_BY_FOLDER else file.with_suffix("")
            unique = name if len(same) == 1 else path.relative_to(folder).as_posix()
            adapters[unique] = file
    for name, same in other_names.items():
        if len(same) == 1 and name not in first_names:
            adapters[name] = same[0]
    return adapters


def _parse_phrase(phrase: str, items: list[str]) -> Mention:
    name, *rest = (item.strip() for item in items)
    weights = [item for item in rest if "=" not in item]
    named: dict[str, str] = {}
    for item in rest:
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _REFUSED and equals:
            raise ValueError(f"{key}= ({_REFUSED[key]}) is not supported; leave it out")
        if equals and (key not in _ARGUMENTS or key in named):
            known = "=, ".join(_ARGUMENTS)
            raise ValueError(f"{key}= is given twice or not known; known are: {known}=")
        if equals:
            named[key] = value
    if {"w", "lbw"} <= named.keys():
        raise ValueError("lbw= and w= are the same; give one of them")
    if not name:
        raise ValueError("it names no adapter")
    blocks = named.get("lbw", named.get("w"))
    # before lbw= there was the vector or preset in the UNet's place
    if blocks is None and len(weights) > 1 and re.match("[A-Za-z]|.*,", weights[-1]):
        blocks = weights.pop()
    if len(weights) > 2:
        raise ValueError("it has more than two weights, the text encoder's and the UNet's")
    text = named.get("te", weights[0] if weights else "1")
    unet = named.get("unet", weights[1] if len(weights) > 1 else text)
    if blocks is not None:
        blocks = tuple(map(_number, blocks.split(","))) if "," in blocks else blocks
        _block_scales(blocks)  # what is wrong with them is said here
    return Mention(name, _number(text), _number(unet), blocks, phrase, *_steps(named))


def _steps(named: dict[str, str]) -> tuple[float | None, float | None]:
    """start= and stop=, or the two of step=."""
    texts = [named.get("start"), named.get("stop")]
    if "step" in named:
        if texts != [None, None] or named["step"].count("-") != 1:
            raise ValueError("step= is two steps, as step=5-10, in place of start= and stop=")
        texts = named["step"].split("-")
    start, stop = (None if text is None else _number(text) for text in texts)
    for number in (start, stop):
        if number is not None and (number < 0 or number >= 1 and number % 1):
            raise ValueError(f"{number:g} is no step; give a whole number, or a share below 1")
    return start, stop


def _block_scales(blocks: str | tuple[float, ...], family: str | None = None) -> dict[str, Scales]:
    if isinstance(blocks, str):
        return preset(blocks, family or "sd")
    return from_block_weights(blocks, family=family)


def _whole_step(number: float, steps: int) -> int:
    """A step, from a step or a share of the steps; a share is one step at least."""
    return max(1, round(number * steps)) if 0 < number < 1 else int(number)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text.strip()!r} is no finite number")
    return number


def _phrase_error(phrase: str, reason: str) -> ValueError:
    phrase = phrase if len(phrase) <= 120 else f"{phrase[:117]}..."
    return ValueError(f"the prompt's {phrase!r} cannot be used: {reason}"[:400])


def _trained_as(file: Path) -> str:
    try:
        with safe_open(file, "pt") as weights:
            return (weights.metadata() or {}).get("ss_output_name", "")
    except (SafetensorError, OSError):  # loading it says what is wrong; it has its other names
        return ""
