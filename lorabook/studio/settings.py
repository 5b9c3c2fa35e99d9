"""What the studio shows, as plain data: read it, set it, save it."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path

from lorabook.blocks import KINDS

MOST_SEEDS, MOST_STEPS = 9, 200
_KIND = "|".join(KINDS)
BLOCK = re.compile(r"(down|up)\.\d+|mid|outside|text_encoder(_2)?")
_PART = re.compile(
    rf"((down|up)\.\d+|mid)\.([a-z_]+_\d+|sampler|{_KIND})|{_KIND}"
    rf"|text_encoder(_2)?\.(layer_\d+|{_KIND})"
)


@dataclass(frozen=True)
class AdapterSettings:
    """How one adapter takes part; all that is said of a layer multiplies, and what is not said is 1.

    Attributes:
        on: whether it takes part.
        scale: of all its layers.
        blocks: scales of "down.0" … "mid" … "up.3", "outside" (the UNet's layers outside its blocks), "text_encoder",
            "text_encoder_2".
        parts: finer ones: "down.0.attentions_1", "up.1.resnets_0", "up.1.sampler", a kind of layer of the UNet
            ("cross-attention") or of one block ("up.1.cross-attention"), "text_encoder.layer_0".
        rank: what its layers are cut to by SVD; None leaves them as trained.
    """

    on: bool = True
    scale: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None

    def __post_init__(self):
        _check(
            isinstance(self.on, bool),
            f"an adapter is on or off, True or False, not {self.on!r:.80}",
        )
        _put(self, "scale", _number(self.scale, "an adapter's scale"))
        for what, names in (("blocks", BLOCK), ("parts", _PART)):
            said = getattr(self, what)
            _check(
                isinstance(said, Mapping),
                f"{what} must be a dictionary of scales, not {said!r:.80}",
            )
            for key in said:
                _check(
                    isinstance(key, str) and names.fullmatch(key),
                    f"{key!r:.80} is not one of the {what} that have a "
                    "scale, which are named as "
                    + (
                        "'down.0', 'mid', 'outside' and 'text_encoder'"
                        if what == "blocks"
                        else f"'up.1.attentions_0', 'up.1.sampler' and {', '.join(KINDS)}"
                    ),
                )
            _put(
                self,
                what,
                {
                    key: value
                    for key in said
                    if (value := _number(said[key], f"the scale of {key}")) != 1
                },
            )
        _check(
            self.rank is None or _is_whole(self.rank) and self.rank >= 1,
            f"a rank is a whole number of 1 or more, or None, not {self.rank!r:.80}",
        )

    def scales(self, components: Iterable[str] = ("unet", "text_encoder")) -> float | dict:
        """The same in the form that `set_scales` takes for one adapter.

        Args:
            components: those that the pipeline has, as the keys of `models_of(pipe)`.
        """
        if not self.blocks and not self.parts:
            return self.scale
        inside: dict[str, dict[str, float]] = {}
        for block, scale in self.blocks.items():
            inside.setdefault(block, {})["*"] = scale
        for part, scale in self.parts.items():
            block, _, what = part.rpartition(".")
            inside.setdefault(block, {})[what] = scale
        texts = [part for part in (*components, *inside) if part.startswith("text_encoder")]
        said: dict = {
            part: _short({**(own := inside.pop(part, {})), "*": self.scale * own.get("*", 1.0)})
            for part in dict.fromkeys(texts)
        }
        return {"unet": _unet_scales(self.scale, inside)} | said


@dataclass(frozen=True)
class StudioSettings:
    """All that decides the studio's picture.

    Attributes:
        prompt, negative_prompt: texts.
        seeds: a picture for each.
        num_inference_steps, guidance_scale: as in the pipeline's call.
        scheduler: a usual name ("ddim", "euler" …); None takes the pipeline's own.
        width, height: in pixels; None takes the model's own.
        adapters: by name.
        compare: whether the base model's picture is drawn beside.
        blend_method: None or "cat" adds the adapters up; another of `METHODS` blends them by it, with their scales as
            weights.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (0,)
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    adapters: Mapping[str, AdapterSettings] = field(default_factory=dict)
    compare: bool = False
    blend_method: str | None = None

    def __post_init__(self):
        for name in ("prompt", "negative_prompt"):
            _check(
                isinstance(getattr(self, name), str),
                f"a {name} is a text, not {getattr(self, name)!r:.80}",
            )
        for name in ("scheduler", "blend_method"):
            given = getattr(self, name)
            _check(
                given is None or isinstance(given, str) and given,
                f"{name} is a name or None, not {given!r:.80}",
            )
        _check(
            isinstance(self.compare, bool), f"compare is True or False, not {self.compare!r:.80}"
        )
        _put(self, "seeds", _seeds(self.seeds))
        steps = self.num_inference_steps
        _check(
            _is_whole(steps) and 1 <= steps <= MOST_STEPS,
            f"num_inference_steps is a whole number from 1 to {MOST_STEPS}, not {steps!r:.80}",
        )
        _put(self, "guidance_scale", _number(self.guidance_scale, "guidance_scale"))
        for name in ("width", "height"):
            size = getattr(self, name)
            _check(
                size is None or _is_whole(size) and 16 <= size <= 4096 and size % 8 == 0,
                f"{name} is a multiple of 8 from 16 to 4096, or None for the model's own, not {size!r:.80}",
            )
        _check(
            isinstance(self.adapters, Mapping),
            f"adapters must be a dictionary by name, not {self.adapters!r:.80}",
        )
        _put(
            self,
            "adapters",
            {
                name: _made(AdapterSettings, value, f"adapter {name!r:.60}")
                for name, value in self.adapters.items()
            },
        )

    def with_(self, **changes) -> "StudioSettings":
        """The same with other values of some fields."""
        return _made(StudioSettings, vars(self) | changes, "the settings")

    def with_adapter(self, name: str, **changes) -> "StudioSettings":
        """The same with one adapter changed, or added; `blocks` and `parts` are merged into those that it has."""
        before = self.adapters.get(name, AdapterSettings())
        for what in ("blocks", "parts"):
            if isinstance(changes.get(what), Mapping):
                changes[what] = {**getattr(before, what), **changes[what]}
        changed = _made(AdapterSettings, vars(before) | changes, f"adapter {name!r:.60}")
        return replace(self, adapters={**self.adapters, name: changed})

    def to_dict(self) -> dict:
        """As plain lists and dictionaries, for JSON."""
        return asdict(self) | {"seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, values: Mapping) -> "StudioSettings":
        """From what `to_dict` gave; fields that are absent take their defaults. Raises ValueError for unknown ones."""
        return _made(cls, values, "the settings")

    def save(self, path: str | os.PathLike) -> Path:
        """Write a JSON file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "StudioSettings":
        """From a file that `save` wrote. Raises FileNotFoundError, or ValueError for a file of something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no settings file {path}")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no settings of the studio: {str(error):.250}") from None


def _unet_scales(scale: float, inside: Mapping[str, Mapping[str, float]]) -> float | dict:
    """The UNet's part of the scales; `inside` by block, "" for kinds of layers everywhere."""
    said: dict = {"*": scale, **inside.get("", {})}
    if "outside" in inside:
        said["embedding"] = (
            said.get("embedding", 1.0) * inside["outside"]["*"]
        )  # the only kind that is outside of blocks
    for block, own in inside.items():
        side, _, number = block.partition(".")
        if side in ("down", "up"):
            said.setdefault(side, {})[f"block_{number}"] = _short(own)
        elif side == "mid":
            said["mid"] = _short(own)
    return _short(said)


def _short(said: Mapping[str, float | dict]) -> float | dict:
    """A number where nothing but "*" is said."""
    return (
        said["*"]
        if set(said) == {"*"}
        else {key: value for key, value in said.items() if (key, value) != ("*", 1.0)}
    )


def _seeds(given) -> tuple[int, ...]:
    _check(
        isinstance(given, Iterable) and not isinstance(given, (str, bytes)),
        f"seeds are several whole numbers, as (0, 1), not {given!r:.80}",
    )
    seeds = tuple(given)
    for seed in seeds:
        _check(
            _is_whole(seed) and 0 <= seed < 2**63,
            f"a seed is a whole number of 0 or more, not {seed!r:.80}",
        )
    _check(
        1 <= len(seeds) <= MOST_SEEDS,
        f"give from 1 to {MOST_SEEDS} seeds, a picture for each, not {len(seeds)}",
    )
    return tuple(map(int, seeds))


def _made(kind: type, values, what: str):
    """A dataclass from itself or from its fields."""
    if isinstance(values, kind):
        return values
    _check(isinstance(values, Mapping), f"{what} must be a dictionary, not {values!r:.80}")
    known = [one.name for one in fields(kind)]
    for key in values:
        _check(key in known, f"{what}: there is no {key!r:.60}; there are: {', '.join(known)}")
    return kind(**values)


def _number(value, what: str) -> float:
    _check(
        isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
        f"{what:.120} must be a finite number, not {value!r:.80}",
    )
    return float(value)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _put(made, name: str, value) -> None:
    object.__setattr__(made, name, value)


def _check(fine, sentence: str) -> None:
    if not fine:
        raise ValueError(sentence)
