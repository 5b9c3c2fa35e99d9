"""How strongly each adapter acts: in all, by component, block, kind and layer, and over the run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from diffusers import DiffusionPipeline
from pandas import DataFrame
from torch import Tensor, nn

from lorabook.blocks import block_of, place_of
from lorabook.live.expand import LayerScales, Steps, expand, steps_of
from lorabook.live.inject import convert_doras
from lorabook.live.layers import (
    LoraLayers,
    activate,
    active_adapters,
    adapter_names,
    denoiser,
    lora_layers,
    models_of,
    read_scale,
    walk,
    write_scale,
)
from lorabook.live.presets import family_of, from_block_weights, preset
from lorabook.live.state import check_known, keep_over_calls, locked, state_of
from lorabook.show.tables import Report
from lorabook.types import Scales


@dataclass(frozen=True, repr=False)
class ScaleTable(Report, Mapping):
    """The scale of each layer: `table[adapter][component][module]` is a number."""

    layers: Mapping[str, LayerScales]  # by adapter
    # (from, to, factor) over the denoising by adapter, where there are any
    steps: Mapping[str, Steps] = field(default_factory=dict)
    empty = "no adapters"

    def __getitem__(self, name: str) -> LayerScales:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def table(self) -> DataFrame:
        """A row a layer: adapter, component, block, part of the block, module, scale."""
        rows = []
        for name, components in self.layers.items():
            for component, modules in components.items():
                for module, scale in modules.items():
                    block = component if component.startswith("text_encoder") else block_of(module)
                    place = place_of(module)
                    part = f"{place[1]}.{place[2]}" if place else ""
                    rows.append((name, component, block, part, module, scale))
        columns = ["adapter", "component", "block", "part", "module", "scale"]
        return DataFrame(rows, columns=columns)

    def cells(self) -> DataFrame:
        """The scales by block, or by its parts where they differ, and the schedule."""
        rows = []
        for name, layers in self.table.groupby("adapter", sort=False):
            for block, inside in layers.groupby("block", sort=False):
                parts = [("", inside)]
                if inside["scale"].nunique() > 1:
                    parts = inside.groupby("part", sort=False)
                for part, scales in parts:
                    low, high = scales["scale"].min(), scales["scale"].max()
                    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                    rows.append((name, f"{block} {part}".rstrip(), text))
            shares = [
                f"× {factor:g} from {a:.0%} to {b:.0%}" for a, b, factor in self.steps.get(name, [])
            ]
            if shares:
                rows.append((name, "over the denoising", ", ".join(shares)))
        return DataFrame(rows, columns=["adapter", "layers", "scale"])


@locked
def set_scales(
    pipe: DiffusionPipeline, scales: Mapping[str, Scales], *, only: bool = False
) -> ScaleTable:
    """Scale adapters: 0 is the base model, 1 the adapter as trained, below 0 its ΔW subtracted.

    Every layer obeys; where the scales say nothing, it is 1. Adapters that are not named keep their
    scale and state. Those that are named are active from now on, unless all is at 0.

    Args:
        pipe: A pipeline with adapters.
        scales: For each adapter's name a number; a dictionary as in diffusers, and finer (see
            `expand`), with "steps": [[0, 0.4, 1.0], [0.4, 1, 0.3]] for shares of the denoising; a
            preset's name (see `PRESETS`); or the 17, 12, 20 or 26 numbers of the A1111 block-weight
            extension.
        only: Switch the adapters off that are not named.

    Returns:
        A ScaleTable with the number of each layer.

    Raises:
        ValueError: For an adapter, component, block or layer that is not there, a scale that is
            not a finite number, or an adapter that is fused. Nothing is changed then.
    """
    if not isinstance(scales, Mapping):
        raise ValueError(f"scales must be a dictionary, as {{'ink': 0.5}}; not {scales!r:.80}")
    layers, modules = lora_layers(pipe), _module_names(pipe)
    check_known(pipe, scales, layers)
    resolved = {name: resolve_scales(pipe, value, name) for name, value in scales.items()}
    table = {
        name: expand(value, modules, name, _touched(layers, name))
        for name, value in resolved.items()
    }
    steps = {name: steps_of(value, name) for name, value in resolved.items()}
    active = active_adapters(pipe, layers)
    convert_doras(pipe, scales, layers)
    acting = set(active) - set(scales) if not only else set()
    for name, components in table.items():
        for component, modules in components.items():
            for module, scale in modules.items():
                layer = layers[component][module]
                write_scale(layer, name, scale)
                # a layer prepared for swapping is compiled as active, and stays so at 0
                if scale != 0 or isinstance(layer.scaling[name], Tensor):
                    acting.add(name)
    set_steps(pipe, steps)
    activate(pipe, [name for name in adapter_names(pipe, layers) if name in acting], layers)
    keep_over_calls(pipe, layers)
    return ScaleTable(table, {name: shares for name, shares in steps.items() if shares})


@locked
def scales_of(pipe: DiffusionPipeline) -> ScaleTable:
    """The scales that adapters have now, layer by layer; 0 throughout where one is switched off."""
    layers = lora_layers(pipe)
    active = active_adapters(pipe, layers)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for component, modules in layers.items():
        for module, layer in modules.items():
            for name in layer.scaling:
                scale = read_scale(layer, name) if name in active else 0.0
                table.setdefault(name, {}).setdefault(component, {})[module] = scale
    return ScaleTable(table, steps_on(pipe))


def layer_scales(pipe: DiffusionPipeline, name: str, scales: Scales) -> LayerScales:
    """The number that scales give each layer of an adapter, by component and module name."""
    resolved = resolve_scales(pipe, scales, name)
    return expand(resolved, _module_names(pipe), name, _touched(lora_layers(pipe), name))


def resolve_scales(pipe: DiffusionPipeline, scales: Scales, name: str) -> Scales:
    """The number or dictionary that scales stand for: presets and vectors looked up."""
    if not isinstance(scales, (str, Sequence)):
        return scales
    family, models = family_of(pipe), models_of(pipe)
    try:
        if isinstance(scales, str):
            resolved = preset(scales, family)
        else:
            resolved = from_block_weights(scales, family=family)
    except ValueError as error:
        raise ValueError(
            f"the scale of {name!r:.60} must be a finite number, scales or a preset's name; "
            f"{str(error):.300}"
        ) from None
    return {component: value for component, value in resolved.items() if component in models}


@dataclass(frozen=True)
class ScaleSchedule:
    """What scales are multiplied by in shares of the run: (from, to, factor) by adapter."""

    steps: Mapping[str, Steps]

    def factors(self, model: nn.Module, args: tuple, kwargs: dict) -> dict[str, float]:
        """The factor of each adapter in one call of the denoiser with these arguments.

        The share of the run is that of the pipeline that `set_scales`, `generate` or `sweep` was
        last called with: a model that several pipelines share does not know which of them calls it.
        """
        pipe = state_of(model).pipeline()
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        share = 1.0 if pipe is None else share_of_run(pipe, timestep)
        if not 0 <= share < 1:
            raise ValueError(
                "scales over the denoising need a pipeline's own call; set them without steps, or "
                "call the pipeline that they were set on"
            )
        return {
            name: next((factor for start, end, factor in steps if start <= share < end), 1.0)
            for name, steps in self.steps.items()
        }


def set_steps(pipe: DiffusionPipeline, steps: Mapping[str, Steps]) -> None:
    """Let adapters' scales be multiplied by a factor in shares of the run; none takes that away."""
    if (model := denoiser(pipe)) is not None:
        by_adapter = steps_on(pipe) | dict(steps)
        by_adapter = {name: shares for name, shares in by_adapter.items() if shares}
        state_of(model).schedule = ScaleSchedule(by_adapter) if by_adapter else None


def steps_on(pipe: DiffusionPipeline) -> dict[str, Steps]:
    """The schedules of a pipeline's adapters, by name."""
    model = denoiser(pipe)
    if model is None:
        return {}
    state_of(model).end_call()  # a run that was interrupted may have left its share's factor
    schedule = state_of(model).schedule
    return dict(schedule.steps) if schedule else {}


def share_of_run(pipe: DiffusionPipeline, timestep: Tensor) -> float:
    """How much of the run lies behind, from 0 to below 1; 1 where the pipeline is not running.

    Image to image runs the last timesteps of the scheduler only.
    """
    scheduler = pipe.scheduler
    times, index = scheduler.timesteps, getattr(scheduler, "step_index", None)
    is_counted = hasattr(type(pipe), "num_timesteps")
    steps = getattr(pipe, "num_timesteps", None if is_counted else len(times))
    if steps is None:  # the pipeline was never called
        return 1.0
    first = getattr(scheduler, "begin_index", None)
    if first is None:
        first = max(0, len(times) - steps)
    if hasattr(scheduler, "counter"):  # PNDM's, which repeats a timestep
        index = first + scheduler.counter
    if index is None:  # before the first step, and with schedulers that do not count
        places = (times[first:] == timestep.flatten()[0].to(times)).nonzero()
        index = first + (int(places[0]) if len(places) else 0)
    return (index - first) / max(len(times) - first, 1)


def _module_names(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """All layers of a pipeline's models, by component."""
    models = models_of(pipe).items()
    return {component: [module for module, _ in walk(model)] for component, model in models}


def _touched(layers: LoraLayers, name: str) -> dict[str, list[str]]:
    """The layers that an adapter has, by component."""
    touched = {
        component: [module for module, layer in modules.items() if name in layer.scaling]
        for component, modules in layers.items()
    }
    return {component: modules for component, modules in touched.items() if modules}
