"""What the studio shows, as plain data: read it, change it, save it."""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType

from lorabook.checks import is_number
from lorabook.types import Scales

DRAG_PAUSE = 1.0  # seconds after which another movement of a slider is a new step to undo
BLOCK = re.compile(r"(down|up)\.\d+|mid|outside|text_encoder(_2)?")


@dataclass(frozen=True)
class AdapterSettings:
    """How one adapter acts.

    Attributes:
        on: Whether it is active.
        scale: Of all its layers.
        blocks: What multiplies that in "down.0" … "mid" … "up.3", "outside" (the UNet's layers
            outside its blocks), "text_encoder", "text_encoder_2"; 1 in a block that is not named.
        layers: Scales by component, as `set_scales` takes them, in place of `blocks`: a preset's,
            or those of a pipeline, where layers of one block differ. None elsewhere.
    """

    on: bool = True
    scale: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Scales] | None = None

    def __post_init__(self):
        _check_fields(self)
        for block, scale in self.blocks.items():
            if not isinstance(block, str) or not BLOCK.fullmatch(block):
                raise ValueError(
                    f"{block!r:.80} is not one of the blocks that have a scale, which are named "
                    "as 'down.0', 'mid', 'outside' and 'text_encoder'"
                )
            _check(is_number(scale), f"the scale of {block} must be a finite number", scale)
        blocks = {block: float(scale) for block, scale in self.blocks.items() if scale != 1}
        object.__setattr__(self, "blocks", blocks)

    def scales(self, components: Iterable[str] = ("unet", "text_encoder")) -> Scales:
        """The same in the form that `set_scales` takes for one adapter.

        Args:
            components: Those that the pipeline has, as the keys of `models_of(pipe)`.
        """
        if self.layers is not None:
            return {component: self._scaled(value) for component, value in self.layers.items()}
        if not self.blocks:
            return self.scale
        scales, unet = dict.fromkeys(components, self.scale), {}
        for block, scale in self.blocks.items():
            side, _, number = block.partition(".")
            if side.startswith("text_encoder"):
                scales[side] = self.scale * scale
            elif number:
                unet.setdefault(side, {})[f"block_{number}"] = scale
            else:  # outside of the blocks there is one kind of layer only
                unet["embedding" if side == "outside" else side] = scale
        return scales | ({"unet": self._scaled(unet)} if unet else {})

    def _scaled(self, scales: Scales) -> Scales:
        """Scales of a component, times that of all layers."""
        if is_number(scales):
            return scales * self.scale
        return scales if self.scale == 1 else {"*": self.scale, **scales}


@dataclass(frozen=True)
class StudioSettings:
    """All that decides the studio's images.

    Attributes:
        prompt, negative_prompt: Texts.
        seeds: An image for each.
        num_inference_steps, guidance_scale: As in the pipeline's call.
        scheduler: A usual name ("ddim", "euler" …); None takes the pipeline's own.
        width, height: In pixels; None takes the model's own.
        adapters: By name.
        compare: Whether the base model's image is shown beside.
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

    def __post_init__(self):
        if isinstance(self.seeds, (list, range)):
            object.__setattr__(self, "seeds", tuple(self.seeds))
        _check_fields(self)
        adapters = {
            name: _read(AdapterSettings, values, f"adapter {name!r:.60}")
            for name, values in self.adapters.items()
        }
        object.__setattr__(self, "adapters", adapters)

    def with_(self, **changes) -> "StudioSettings":
        """The same with some fields changed."""
        return self.from_dict(vars(self) | changes)

    def with_adapter(self, name: str, **changes) -> "StudioSettings":
        """The same with one adapter changed or added; `blocks` join those it has."""
        before = self.adapters.get(name, AdapterSettings())
        if isinstance(changes.get("blocks"), Mapping):
            changes = {"layers": None} | changes | {"blocks": before.blocks | changes["blocks"]}
        return replace(self, adapters={**self.adapters, name: vars(before) | changes})

    def in_words(self) -> str:
        """The active adapters with their scales, and the seeds, in a few words."""
        words = []
        for name, adapter in self.adapters.items():
            if adapter.on:
                moved = f" ({len(adapter.blocks)} moved)" if adapter.blocks else ""
                words.append(f"{name} {adapter.scale:g}{moved}")
        seeds = ", ".join(map(str, self.seeds))
        return f"{' + '.join(words) or 'base model'} · seed {seeds}"

    def to_dict(self) -> dict:
        """As plain lists and dictionaries, for JSON."""
        return asdict(self) | {"seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, values: Mapping) -> "StudioSettings":
        """From what `to_dict` gave; absent fields take their defaults.

        Raises:
            ValueError: For an unknown field or a value that makes no sense.
        """
        return _read(cls, values, "the settings")


class History:
    """Settings to go back and forth in; the many steps of one slider's drag count as one.

    Attributes:
        present: The settings in force.
        past, undone: Those before, and those to go forth to, the nearest last.
    """

    def __init__(self, present: StudioSettings):
        self.present = present
        self.past: list[StudioSettings] = []
        self.undone: list[StudioSettings] = []
        self._changed: set[str] = set()
        self._changed_at = -math.inf

    def push(self, settings: StudioSettings) -> None:
        """Let settings follow the present ones; what was undone is forgotten."""
        before, after = (dict(_flat(each.to_dict())) for each in (self.present, settings))
        names = before.keys() | after.keys()
        changed = {name for name in names if before.get(name) != after.get(name)}
        if not changed:
            return
        now = time.monotonic()
        is_same = len(changed) == 1 and changed == self._changed
        if not (is_same and now - self._changed_at < DRAG_PAUSE):
            self.past.append(self.present)
        self.present, self.undone = settings, []
        self._changed, self._changed_at = changed, now

    def undo(self) -> None:
        """Go back to the settings before, where there are any."""
        self._go(self.past, self.undone)

    def redo(self) -> None:
        """Go forth to what was undone, if anything was."""
        self._go(self.undone, self.past)

    def _go(self, source: list[StudioSettings], target: list[StudioSettings]) -> None:
        if source:
            target.append(self.present)
            self.present = source.pop()
        self._changed = set()


def _flat(values: Mapping, path: str = "") -> Iterator[tuple[str, object]]:
    """All values, one at a time, as ("adapters.ink.blocks.up.1", 0.5)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _is_whole(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_size(value: object) -> bool:
    return value is None or _is_whole(value, 16, 4096) and value % 8 == 0


def _are_seeds(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 9 and all(_is_whole(s, 0) for s in value)


_SIZE = "is a multiple of 8 from 16 to 4096, or None for the model's own"
_RULES = {  # a type or a function, and what an error says
    "on": (bool, "an adapter is on or off, True or False"),
    "scale": (is_number, "an adapter's scale must be a finite number"),
    "blocks": (Mapping, "blocks must be a dictionary of scales"),
    "layers": ((Mapping, NoneType), "layers must be scales by component, or None"),
    "prompt": (str, "a prompt is a text"),
    "negative_prompt": (str, "a negative_prompt is a text"),
    "seeds": (_are_seeds, "seeds are from 1 to 9 whole numbers of 0 or more, as (0, 1)"),
    "num_inference_steps": (
        lambda v: _is_whole(v, 1, 200),
        "num_inference_steps is a whole number from 1 to 200",
    ),
    "guidance_scale": (is_number, "guidance_scale must be a finite number"),
    "scheduler": ((str, NoneType), "scheduler is a name or None"),
    "width": (_is_size, f"width {_SIZE}"),
    "height": (_is_size, f"height {_SIZE}"),
    "adapters": (Mapping, "adapters must be a dictionary by name"),
    "compare": (bool, "compare is True or False"),
}


def _check_fields(settings: AdapterSettings | StudioSettings) -> None:
    for name, value in vars(settings).items():
        valid, rule = _RULES[name]
        is_type = isinstance(valid, (type, tuple))
        _check(isinstance(value, valid) if is_type else valid(value), rule, value)
        if valid is is_number:
            object.__setattr__(settings, name, float(value))


def _read(cls: type, values: object, what: str):
    """A dataclass from itself or from its fields."""
    if isinstance(values, cls):
        return values
    _check(isinstance(values, Mapping), f"{what} must be a dictionary", values)
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{what}: there is no {key!r:.60}; there are: {', '.join(known)}")
    return cls(**values)


def _check(valid: bool, rule: str, value: object) -> None:
    if not valid:
        raise ValueError(f"{rule}, not {value!r:.80}")
