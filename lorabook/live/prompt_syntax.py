"""The adapters that a prompt names, in A1111's syntax: `<lora:name:weight>`."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorabook.live.presets import TEXT_ENCODERS, from_block_weights, preset
from lorabook.lora.formats.keys import WEIGHT_NAME

KINDS = ("lora", "lyco")
_NAMED = ("te", "unet", "lbw", "w", "start", "stop", "step")
_NOT_READ = {
    "lbwe": "weights of single layers",
    "x": "a weight for the X in block weights",
    "dyn": "another rank",
}
_PHRASE = re.compile(r"<\s*(?P<kind>\w+)(?![\w-])\s*(?P<rest>:[^<>]*)?(?P<end>>?)")
_PLAIN_NAMES = (
    WEIGHT_NAME,
    "adapter_model.safetensors",
)  # of files that are called after their folder


@dataclass(frozen=True)
class Mention:
    """An adapter as a prompt names it.

    Attributes:
        name: as written.
        text_encoder, unet: the weights.
        blocks: a preset's name, a vector of block weights, or None.
        start, stop: the denoising step with which it begins to act on the UNet, and the one with which it ends, counted
            from 0; between 0 and 1 a share of the steps; None is from the first and to the last.
        phrase: the whole of it, as written.
    """

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0
    blocks: str | tuple[float, ...] | None = None
    phrase: str = ""
    start: float | None = None
    stop: float | None = None

    def scales(self, family: str, steps: int | None = None) -> float | dict:
        """The scales it asks for, as `set_scales` takes them.

        Args:
            family: "sd" or "sdxl".
            steps: of the denoising, of which `start` and `stop` are some.
        """
        shares = self._shares(steps)
        said = self._weights(family)
        if not shares:
            return said
        return (
            said
            if isinstance(said, dict)
            else dict.fromkeys((*TEXT_ENCODERS[family], "unet"), said)
        ) | {"steps": shares}

    def _shares(self, steps: int | None) -> list[list[float]]:
        """The shares of the run in which it does not act."""
        if self.start is None and self.stop is None:
            return []
        if steps is None:
            raise phrase_error(
                self.phrase,
                "start=, stop= and step= count steps of the denoising, and none are told",
            )
        start = 0 if self.start is None else _step(self.start, steps)
        stop = steps if self.stop is None else _step(self.stop, steps)
        if self.start is not None and self.stop is not None and start >= stop:
            raise phrase_error(
                self.phrase,
                f"with {steps} steps it would end, at {stop}, before it begins, at {start}",
            )
        ends = ((0.0, min(start / steps, 1.0)), (min(stop / steps, 1.0), 1.0))
        return [[begin, end, 0.0] for begin, end in ends if begin < end]

    def _weights(self, family: str) -> float | dict:
        if self.blocks is None and self.text_encoder == self.unet:
            return self.unet
        if self.blocks is None:
            return dict.fromkeys(TEXT_ENCODERS[family], self.text_encoder) | {"unet": self.unet}
        named = isinstance(self.blocks, str)
        parts = (
            preset(self.blocks, family) if named else from_block_weights(self.blocks, family=family)
        )
        unet = parts.pop("unet")
        unet = {"*": self.unet} | unet if isinstance(unet, dict) else self.unet * unet
        return {text: self.text_encoder * number for text, number in parts.items()} | {"unet": unet}


def phrase_error(phrase: str, reason: str) -> ValueError:
    """What to raise for a phrase that cannot be used."""
    phrase = phrase if len(phrase) <= 120 else f"{phrase[:117]}..."
    return ValueError(f"the prompt's {phrase!r} cannot be used: {reason}"[:400])


def _step(number: float, steps: int) -> int:
    """A step, or a share of the steps, which is one step at the least."""
    return max(1, round(number * steps)) if 0 < number < 1 else int(number)


def parse_prompt(prompt: str) -> tuple[str, list[Mention]]:
    """A prompt without the adapters it names, and these.

    A phrase is `<lora:name>`, `<lora:name:weight>` or `<lora:name:text encoder's weight:unet's>`, then `te=`, `unet=`,
    `lbw=` or `w=` (a vector of block weights or a preset's name), `start=`, `stop=` and `step=5-10` (the denoising steps
    between which it acts, see `Mention`); `lyco` for `lora` means the same, blanks beside the colons mean nothing. Without
    a weight it is 1; without one for the UNet it is the text encoder's. Only the phrase is taken out: commas and blanks
    beside it stay, as in A1111.

    Args:
        prompt: positive or negative.
    Returns: (prompt, mentions in their order).
    Raises: ValueError, naming the phrase, where it cannot be parsed.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/extra_networks.py and extensions-builtin/Lora; lbw and steps are
        those of hako-mikan/sd-webui-lora-block-weight.
    """
    mentions: list[Mention] = []

    def take(found: re.Match) -> str:
        whole = found["rest"] and found["end"]
        if found["kind"].lower() not in KINDS:
            if whole:
                raise phrase_error(
                    found[0], f"a phrase in angle brackets begins with one of: {', '.join(KINDS)}"
                )
            return found[0]
        if not whole:
            raise phrase_error(prompt[found.start() :], "it should read <lora:name:weight>")
        mentions.append(_mention(found[0], [item.strip() for item in found["rest"][1:].split(":")]))
        return ""

    return _PHRASE.sub(take, prompt), mentions


def merged(mentions: Iterable[Mention]) -> dict[str, Mention]:
    """One mention for each name; the weights of an adapter that is named several times add up.

    Raises: ValueError where such mentions have different block weights.
    """
    found: dict[str, Mention] = {}
    for mention in mentions:
        first = found.setdefault(mention.name, mention)
        if first is not mention:
            if (first.blocks, first.start, first.stop) != (
                mention.blocks,
                mention.start,
                mention.stop,
            ):
                raise phrase_error(
                    mention.phrase,
                    f"{mention.name!r} is named before with other block weights or other "
                    "steps; name it once",
                )
            found[mention.name] = replace(
                first,
                text_encoder=first.text_encoder + mention.text_encoder,
                unet=first.unet + mention.unet,
            )
    return found


def find_adapters(folder) -> dict[str, Path]:
    """The adapters in a folder and the folders in it, by every name that a prompt may call them.

    An adapter's name is its file's, or its folder's where the file has diffusers' or PEFT's usual name; where two have the
    same, the path from the folder on ("old/ink"). A folder with one file, and the name that Kohya's training was told
    (`ss_output_name` in the metadata), are names too where nothing else has them.

    Raises: FileNotFoundError if there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.absolute()} to look for adapters in")
    files = sorted(
        file
        for file in folder.rglob("*.safetensors")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    together = Counter(file.parent for file in files)
    own: dict[str, list[Path]] = {}
    other: dict[str, list[Path]] = {}
    for file in files:
        alone = file.parent != folder and together[file.parent] == 1
        names = [file.parent.name if file.name in _PLAIN_NAMES else file.stem]
        names += [file.parent.name] * alone + [_trained_as(file)]
        own.setdefault(names[0], []).append(file)
        for name in set(names[1:]) - {names[0], ""}:
            other.setdefault(name, []).append(file)
    found = {}
    for name, same in own.items():
        for file in same:
            path = file.parent if file.name in _PLAIN_NAMES else file.with_suffix("")
            found[name if len(same) == 1 else path.relative_to(folder).as_posix()] = file
    return found | {
        name: same[0] for name, same in other.items() if len(same) == 1 and name not in own
    }


def _mention(phrase: str, items: list[str]) -> Mention:
    name, *rest = items
    given = [item for item in rest if "=" not in item]
    named: dict[str, str] = {}
    for key, value in (map(str.strip, item.split("=", 1)) for item in rest if "=" in item):
        if key in _NOT_READ:
            raise phrase_error(phrase, f"{key}= ({_NOT_READ[key]}) is not supported; leave it out")
        if key not in _NAMED or key in named:
            raise phrase_error(
                phrase, f"{key}= is given twice or not known; known are: {'=, '.join(_NAMED)}="
            )
        named[key] = value
    if "w" in named:
        if "lbw" in named:
            raise phrase_error(phrase, "lbw= and w= are the same; give one of them")
        named["lbw"] = named.pop("w")
    if not name:
        raise phrase_error(phrase, "it names no adapter")
    # before lbw= there was the vector or preset in the UNet's place
    if len(given) > 1 and "lbw" not in named and not _is_number(given[-1]):
        named["lbw"] = given.pop()
    if len(given) > 2:
        raise phrase_error(
            phrase, "it has more than two weights, the text encoder's and the UNet's"
        )
    text = named.get("te", given[0] if given else "1")
    unet = named.get("unet", given[1] if len(given) > 1 else text)
    blocks = _blocks(phrase, named["lbw"]) if "lbw" in named else None
    return Mention(
        name, _number(phrase, text), _number(phrase, unet), blocks, phrase, *_steps(phrase, named)
    )


def _steps(phrase: str, named: dict[str, str]) -> tuple[float | None, float | None]:
    """start= and stop=, or the two of step=, checked."""
    if "step" in named:
        if "start" in named or "stop" in named or named["step"].count("-") != 1:
            raise phrase_error(
                phrase, "step= is two steps, as step=5-10, in place of start= and stop="
            )
        named["start"], named["stop"] = named["step"].split("-")
    start, stop = (
        _number(phrase, named[key]) if key in named else None for key in ("start", "stop")
    )
    for number in (start, stop):
        if number is not None and (number < 0 or number >= 1 and number % 1):
            raise phrase_error(
                phrase,
                f"{number:g} is no step; give a whole number from 0, or a share of the steps below 1",
            )
    return start, stop


def _blocks(phrase: str, text: str) -> str | tuple[float, ...]:
    """Block weights, checked."""
    try:
        if "," not in text:
            preset(text)
            return text
        numbers = tuple(_number(phrase, item) for item in text.split(","))
        from_block_weights(numbers)
        return numbers
    except ValueError as error:
        raise (
            error if str(error).startswith("the prompt's") else phrase_error(phrase, str(error))
        ) from error


def _number(phrase: str, text: str) -> float:
    if not _is_number(text):
        raise phrase_error(phrase, f"{text.strip()!r} is no finite number")
    return float(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _trained_as(file: Path) -> str:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("ss_output_name", "")
    except (
        SafetensorError,
        OSError,
    ):  # a damaged file has its other names; loading it says what is wrong
        return ""
