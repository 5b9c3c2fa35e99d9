"""One cell of a grid: which call makes its image, and with which scale of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffusers import DiffusionPipeline

from lorabook.checks import is_number, listed
from lorabook.live.expand import steps_of
from lorabook.live.layers import LoraLayers, active_adapters
from lorabook.live.scales import layer_scales, resolve_scales, scales_of, steps_on
from lorabook.types import Scales

SWEEP_ADAPTER = "swept"  # the name of an adapter that a sweep itself puts on the pipeline
LayerScales = Mapping[tuple[str, str], float]  # by component and module


@dataclass(frozen=True)
class Cell:
    """What makes one image.

    Attributes:
        call: Prompt, negative_prompt, seed, guidance_scale, num_inference_steps, scheduler.
        scales: By adapter, the scales of the layers that an axis names.
        steps: By adapter, its scales over the denoising, as `steps_of` gives them.
        only: The one active adapter; "" is none, None leaves the active ones.
        source: Where that adapter is, if it is not on the pipeline.
        ratio: The weights of two adapters.
        method: How to blend these two, or else the active adapters.
        factor: Multiplies all scales.
    """

    call: Mapping[str, object]
    scales: Mapping[str, LayerScales] = field(default_factory=dict)
    steps: Mapping[str, Sequence] = field(default_factory=dict)
    only: str | None = None
    source: object = None
    ratio: Mapping[str, float] = field(default_factory=dict)
    method: str | None = None
    factor: float = 1.0

    def with_scales(
        self, pipe: DiffusionPipeline, adapter: str, scales: Scales, whole: bool
    ) -> "Cell":
        """The cell with an adapter's scales, as in `set_scales`; two for one layer multiply.

        They hold for the whole adapter, or only for the layers that they name.
        """
        scales = resolve_scales(pipe, scales, adapter)
        zeros = _flat(layer_scales(pipe, adapter, 0.0 if whole else _zeros(scales)))
        layers, steps = dict(self.scales.get(adapter, {})), dict(self.steps)
        for key, scale in _flat(layer_scales(pipe, adapter, scales)).items():
            if zeros[key] == 0:
                layers[key] = layers.get(key, 1.0) * scale
        if whole or "steps" in scales:
            steps[adapter] = steps_of(scales, adapter)
        return replace(self, scales={**self.scales, adapter: layers}, steps=steps)


@dataclass(frozen=True)
class Present:
    """The adapters on a pipeline before a sweep: the active ones, all scales, all schedules."""

    active: Sequence[str]
    scales: Mapping[str, LayerScales]
    steps: Mapping[str, Sequence]

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "Present":
        """As they are now."""
        scales = {name: _flat(layers) for name, layers in scales_of(pipe).items()}
        return cls(active_adapters(pipe), scales, steps_on(pipe))

    def scales_of(self, name: str) -> Scales:
        """An active adapter's scales and schedule, as `set_scales` takes them."""
        by_component: dict[str, dict[str, float]] = {}
        for (component, module), scale in self.scales[name].items():
            by_component.setdefault(component, {})[module] = scale
        scales = {component: _as_one(layers) for component, layers in by_component.items()}
        if steps := self.steps.get(name):
            return {**scales, "steps": steps}
        return _as_one(scales)

    def weights(self, cell: Cell) -> Mapping[str, Scales]:
        """What a cell blends: the two of a ratio, or all active adapters at their scales."""
        if cell.method is None:
            return {}
        unscheduled = replace(self, steps={})
        weights = cell.ratio or {name: unscheduled.scales_of(name) for name in self.active}
        if len(weights) < 2:
            raise ValueError(
                f"'method' blends at least two adapters; {listed(weights)} takes part. Load "
                "another, or enable it, or vary a ratio as 'ink:creatures' beside it"
            )
        return weights

    def scales_in(self, layers: LoraLayers, cell: Cell) -> dict[str, LayerScales]:
        """The scale of each of these layers in every adapter on the pipeline, for one cell."""
        blended, scales = self.weights(cell), {}
        for (component, module), layer in _flat(layers).items():
            for name in layer.scaling:
                scales.setdefault(name, {})[component, module] = 1.0
        for name, trained in scales.items():
            is_active = cell.only in (None, name) and name not in blended
            before = self.scales.get(name, trained)
            if cell.only == name and name not in self.active:
                before = trained
            factor = cell.factor if is_active else 0.0
            numbers = {**before, **cell.scales.get(name, {})}
            scales[name] = {key: scale * factor for key, scale in numbers.items()}
        return scales

    def schedule_in(self, cell: Cell) -> dict[str, list]:
        """The scales over the denoising by adapter, for one cell."""
        steps = {**self.steps, **cell.steps}
        return {name: list(shares) for name, shares in steps.items() if shares}


def scales_at(path: str, value: object) -> Scales:
    """Scales that say `value` at a path: ("unet.up", 0.5) is {"unet": {"up": 0.5}}."""
    component, _, rest = path.partition(".")
    if component == "steps":
        return {"steps": as_schedule(value)}
    side, _, inner = rest.partition(".")
    keys = [component, rest]
    if side in ("down", "up"):
        keys = [component, side, *inner.split(".", 1)]
    elif side == "mid":
        keys = [component, side, inner]
    for key in filter(None, reversed(keys)):
        value = {key: value}
    return value


def as_schedule(value: object) -> Sequence:
    """A share of the run, as (0.2, 0.5), as the schedule of an adapter that acts in it alone."""
    if isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value)):
        start, end = value
        shares = [0, start, 0.0], [start, end, 1.0], [end, 1, 0.0]
        return [share for share in shares if share[0] != share[1]]
    return value


def _as_one(scales: Mapping[str, Scales]) -> Scales:
    """The one number that all of these are, or else these."""
    first = next(iter(scales.values()))
    is_one = is_number(first) and all(scale == first for scale in scales.values())
    return first if is_one else scales


def _flat(layers: Mapping[str, Mapping]) -> dict:
    return {
        (component, key): layers[component][key]
        for component in layers
        for key in layers[component]
    }


def _zeros(scales: Scales) -> Scales:
    """The same scales with 0 for each number, which shows the layers that they name."""
    if isinstance(scales, Mapping):
        return {key: value if key == "steps" else _zeros(value) for key, value in scales.items()}
    return [0.0] * len(scales) if isinstance(scales, Sequence) else 0.0
