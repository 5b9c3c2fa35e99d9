"""What the studio shows, as plain data: read it, change it, save it."""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from lorabook.blocks import KINDS
from lorabook.checks import is_number
from lorabook.types import Scales

DRAG_PAUSE = 1.0  # seconds after which another movement of a slider is a new step to undo
_KIND = "|".join(KINDS)
BLOCK = re.compile(r"(down|up)\.\d+|mid|outside|text_encoder(_2)?")
_PART = re.compile(
    rf"((down|up)\.\d+|mid)\.([a-z_]+_\d+|sampler|{_KIND})|{_KIND}"
    rf"|text_encoder(_2)?\.(layer_\d+|{_KIND})"
)
_NAMES = {
    "blocks": (BLOCK, "'down.0', 'mid', 'outside' and 'text_encoder'"),
    "parts": (_PART, f"'up.1.attentions_0', 'up.1.sampler' and {', '.join(KINDS)}"),
}


@dataclass(frozen=True)
class AdapterSettings:
    """How one adapter acts. All scales that name a layer multiply; what no scale names is at 1.

    Attributes:
        on: Whether it is active.
        scale: Of all its layers.
        blocks: Scales of "down.0" … "mid" … "up.3", "outside" (the UNet's layers outside its
            blocks), "text_encoder", "text_encoder_2".
        parts: Finer ones: "down.0.attentions_1", "up.1.sampler", a kind of layer of the UNet
            ("cross-attention") or of one block ("up.1.cross-attention"), "text_encoder.layer_0".
        rank: To which its layers are cut by SVD; None leaves them as trained.
    """

    on: bool = True
    scale: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None

    def __post_init__(self):
        _check_fields(self)
        for field_name, (pattern, examples) in _NAMES.items():
            scales = getattr(self, field_name)
            for key, scale in scales.items():
                if not isinstance(key, str) or not pattern.fullmatch(key):
                    raise ValueError(
                        f"{key!r:.80} is not one of the {field_name} that have a scale, which are "
                        f"named as {examples}"
                    )
                _check(is_number(scale), f"the scale of {key} must be a finite number", scale)
            scales = {key: float(scale) for key, scale in scales.items() if scale != 1}
            object.__setattr__(self, field_name, scales)

    def scales(self, components: Iterable[str] = ("unet", "text_encoder")) -> Scales:
        """The same in the form that `set_scales` takes for one adapter.

        Args:
            components: Those that the pipeline has, as the keys of `models_of(pipe)`.
        """
        if not self.blocks and not self.parts:
            return self.scale
        tree: dict = {"unet": {"*": self.scale}}
        for component in [*components, *self.blocks, *self.parts]:
            if text := re.match("text_encoder(_2)?", component):
                tree[text[0]] = {"*": self.scale}
        for key, scale in (self.blocks | self.parts).items():
            block = BLOCK.match(key)
            part = (key[block.end() + 1 :] or "*") if block else key
            side, _, number = block[0].partition(".") if block else ("", "", "")
            if side.startswith("text_encoder"):
                group = tree[side]
            elif side == "outside":
                group, part = tree["unet"], "embedding"  # the only kind of layer out there
            elif side == "mid":
                group = tree["unet"].setdefault("mid", {})
            elif side:
                group = tree["unet"].setdefault(side, {}).setdefault(f"block_{number}", {})
            else:
                group = tree["unet"]
            group[part] = group.get(part, 1.0) * scale
        return {component: _short(scales) for component, scales in tree.items()}


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
        blend_method: None or "cat" adds the adapters up; another of `METHODS` blends them by it,
            with their scales as weights.
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
        """The same with one adapter changed or added; `blocks` and `parts` join those it has."""
        before = self.adapters.get(name, AdapterSettings())
        for group in _NAMES:
            if isinstance(changes.get(group), Mapping):
                changes[group] = {**getattr(before, group), **changes[group]}
        return replace(self, adapters={**self.adapters, name: vars(before) | changes})

    def in_words(self) -> str:
        """The active adapters with their scales, and the seeds, in a few words."""
        words = []
        for name, adapter in self.adapters.items():
            moved = len(adapter.blocks) + len(adapter.parts)
            if adapter.on:
                words.append(f"{name} {adapter.scale:g}" + f" ({moved} moved)" * (moved > 0))
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
    """Settings to go back and forth in; the many steps of one slider's drag count as one."""

    def __init__(self, settings: StudioSettings):
        self._steps, self._index = [settings], 0
        self._changed: frozenset[str] = frozenset()
        self._changed_at = -math.inf

    @property
    def present(self) -> StudioSettings:
        """The settings in force."""
        return self._steps[self._index]

    @property
    def can_undo(self) -> bool:
        """Whether there is something before."""
        return self._index > 0

    @property
    def can_redo(self) -> bool:
        """Whether something was undone."""
        return self._index + 1 < len(self._steps)

    def push(self, settings: StudioSettings) -> None:
        """Let settings follow the present ones; what was undone is forgotten."""
        changed = frozenset(n for n, _ in set(_flat(self.present)) ^ set(_flat(settings)))
        if not changed:
            return
        now = time.monotonic()
        # a crossfade moves two sliders
        is_drag = changed == self._changed and len(changed) < 3
        is_drag = is_drag and now - self._changed_at < DRAG_PAUSE and not self.can_redo
        self._index += not (is_drag and self.can_undo)
        self._steps[self._index :] = [settings]
        self._changed, self._changed_at = changed, now

    def go(self, steps: int) -> None:
        """Go back (−1) or forth (1), where there is something."""
        self._index = min(max(self._index + steps, 0), len(self._steps) - 1)
        self._changed = frozenset()

    def drop(self) -> None:
        """Take the newest settings out, as if they had never been."""
        self._steps.pop()
        self.go(0)


def _flat(settings: StudioSettings) -> Iterator[tuple[str, object]]:
    """All values, one at a time, as ("adapters.ink.blocks.up.1", 0.5)."""
    waiting = list(vars(settings).items())
    while waiting:
        name, value = waiting.pop()
        value = vars(value) if isinstance(value, AdapterSettings) else value
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            yield name, value


def _short(scales: dict) -> Scales:
    """Scales with less to read: a lone "*" as its number, and no "*" at 1."""
    if list(scales) == ["*"]:
        return scales["*"]
    items = [item for item in scales.items() if item != ("*", 1.0)]
    return {key: _short(value) if isinstance(value, dict) else value for key, value in items}


def _is_whole(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_size(value: object) -> bool:
    return value is None or _is_whole(value, 16, 4096) and value % 8 == 0


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str) and value != ""


def _are_seeds(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 9 and all(_is_whole(s, 0) for s in value)


_SIZE = "is a multiple of 8 from 16 to 4096, or None for the model's own"
_RULES = {  # a type or a function, and what an error says
    "on": (bool, "an adapter is on or off, True or False"),
    "scale": (is_number, "an adapter's scale must be a finite number"),
    "blocks": (Mapping, "blocks must be a dictionary of scales"),
    "parts": (Mapping, "parts must be a dictionary of scales"),
    "rank": (lambda v: v is None or _is_whole(v, 1), "a rank is a whole number from 1, or None"),
    "prompt": (str, "a prompt is a text"),
    "negative_prompt": (str, "a negative_prompt is a text"),
    "seeds": (_are_seeds, "seeds are from 1 to 9 whole numbers of 0 or more, as (0, 1)"),
    "num_inference_steps": (
        lambda v: _is_whole(v, 1, 200),
        "num_inference_steps is a whole number from 1 to 200",
    ),
    "guidance_scale": (is_number, "guidance_scale must be a finite number"),
    "scheduler": (_is_name, "scheduler is a name or None"),
    "width": (_is_size, f"width {_SIZE}"),
    "height": (_is_size, f"height {_SIZE}"),
    "adapters": (Mapping, "adapters must be a dictionary by name"),
    "compare": (bool, "compare is True or False"),
    "blend_method": (_is_name, "blend_method is a name or None"),
}


def _check_fields(settings: AdapterSettings | StudioSettings) -> None:
    for name, value in vars(settings).items():
        valid, rule = _RULES[name]
        _check(isinstance(value, valid) if isinstance(valid, type) else valid(value), rule, value)
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
