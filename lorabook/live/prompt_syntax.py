"""The adapters that a prompt names, in A1111's syntax: `<lora:name:weight>`."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorabook.live.block_weights import from_block_weights
from lorabook.live.mention import Mention, phrase_error
from lorabook.live.presets import preset
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


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the names that are like it, or those there are."""
    known = list(known)
    lower = {other.lower(): other for other in known}
    like = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, 4, 0.5)]
    return (
        f"the nearest are: {', '.join(like)}"
        if like
        else f"there are: {', '.join(known[:8]) or 'none'}"
    )


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
