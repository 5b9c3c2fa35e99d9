"""How strongly each adapter takes part: in all, by component, block, kind and layer, and over the denoising."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorabook.blocks import block_of, place_of
from lorabook.live.expand import expand, steps_of
from lorabook.live.inject import convert_doras
from lorabook.live.layers import (
    LoraLayers,
    activate,
    active_adapters,
    adapter_names,
    lora_layers,
    models_of,
    read_scale,
    walk,
    write_scale,
)
from lorabook.live.presets import from_block_weights, preset
from lorabook.live.scale_schedule import set_steps, steps_on
from lorabook.live.state import check_known, keep_over_calls, locked
from lorabook.show.tables import as_html


@dataclass(frozen=True, repr=False)
class ScaleTable(Mapping):
    """Effective scales; `table[adapter][component][layer]` is a number.

    Attributes:
        layers: numbers by adapter, component and layer.
        steps: (from, to, factor) over the denoising by adapter, where there are any.
    """

    layers: Mapping[str, Mapping[str, Mapping[str, float]]]
    steps: Mapping[str, list] = field(default_factory=dict)

    def __getitem__(self, name: str):
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def by_block(self, name: str) -> dict[str, tuple[float, float]]:
        """The smallest and largest scale of an adapter by block: "down.0", "up.1 attentions.2", "text_encoder" …

        A block's parts are told apart where their scales differ.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for part, layers in self.layers[name].items():
            for module, factor in layers.items():
                block = part if part.startswith("text_encoder") else block_of(module)
                place = place_of(module)
                found.setdefault(block, {}).setdefault(
                    f"{place[1]}.{place[2]}" if place else "", []
                ).append(factor)
        rows = {}
        for block, parts in found.items():
            numbers = [factor for factors in parts.values() for factor in factors]
            if min(numbers) == max(numbers) or len(parts) == 1:
                rows[block] = min(numbers), max(numbers)
            else:
                rows |= {
                    f"{block} {part}": (min(factors), max(factors))
                    for part, factors in parts.items()
                }
        return rows

    def _rows(self, name: str) -> list[tuple[str, str]]:
        rows = [
            (place, f"{low:g}" if low == high else f"{low:g} to {high:g}")
            for place, (low, high) in self.by_block(name).items()
        ]
        shares = [
            f"× {factor:g} from {start:.0%} to {end:.0%}"
            for start, end, factor in self.steps.get(name, ())
        ]
        return rows + [("over the denoising", ", ".join(shares))] * bool(shares)

    def __str__(self):
        return "\n".join(
            f"{name}: " + ", ".join(f"{place} {text}" for place, text in self._rows(name))
            for name in self
        )

    __repr__ = __str__

    def _repr_html_(self):
        return as_html(
            ["adapter", "layers", "scale"],
            [(name, *row) for name in self for row in self._rows(name)],
        )


@locked
def set_scales(pipe, scales: Mapping[str, object], *, only: bool = False) -> ScaleTable:
    """Scale adapters: 0 is the base model, 1 the adapter as trained, below 0 its ΔW subtracted.

    A scale multiplies the adapter's ΔW, whatever its kind. Every layer obeys; what the scales do not say is 1. Adapters
    that are not named keep their scale and state; those that are named take part from now on, unless all is at 0.

    Args:
        pipe: a pipeline with adapters.
        scales: for each adapter's name a number; a dictionary as in diffusers, and finer (see `expand`), with
            "steps": [[0, 0.4, 1.0], [0.4, 1, 0.3]] for shares of the denoising; a preset's name (see `PRESETS`); or the
            17, 12, 20 or 26 numbers of the A1111 block-weight extension.
        only: switch the adapters off that are not named.
    Returns: a ScaleTable with the number of each layer, which shows itself.
    Raises: ValueError for an adapter, component, block or layer that is not there, a scale that is not a finite number,
        or an adapter that is fused. Then nothing is changed.
    """
    if not isinstance(scales, Mapping):
        raise ValueError(
            f"scales must be a dictionary by adapter's name, as {{'ink': 0.5}}; not {scales!r:.80}"
        )
    modules = {part: dict(walk(model)) for part, model in models_of(pipe).items()}
    layers = lora_layers(pipe)
    check_known(pipe, scales, layers)
    said = {name: resolve_scales(pipe, value, name) for name, value in scales.items()}
    factors = {
        name: expand(value, modules, name, _touched(layers, name)) for name, value in said.items()
    }
    steps = {name: steps_of(value, name) for name, value in said.items()}
    convert_doras(pipe, scales)
    for name, parts in factors.items():
        for part, found in parts.items():
            for module, factor in found.items():
                write_scale(layers[part][module], name, factor)
    set_steps(pipe, steps)
    before = active_adapters(pipe, layers)
    # at 0 there is nothing to compute; but a model prepared for swapping is compiled, and goes on as it is
    working = {
        name: any(
            factor or isinstance(layers[part][module].scaling[name], Tensor)
            for part, found in parts.items()
            for module, factor in found.items()
        )
        for name, parts in factors.items()
    }
    activate(
        pipe,
        [
            name
            for name in adapter_names(pipe, layers)
            if working.get(name, name in before and not only)
        ],
        layers,
    )
    keep_over_calls(pipe)
    return ScaleTable(factors, {name: shares for name, shares in steps.items() if shares})


@locked
def scales_of(pipe) -> ScaleTable:
    """The scales that a pipeline's adapters have now, layer by layer; 0 throughout for those that are switched off."""
    active = set(active_adapters(pipe))
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in adapter_names(pipe)}
    for part, layers in lora_layers(pipe).items():
        for module, layer in layers.items():
            for name in layer.scaling:
                table[name].setdefault(part, {})[module] = (
                    read_scale(layer, name) if name in active else 0.0
                )
    return ScaleTable(table, steps_on(pipe))


def resolve_scales(pipe, value, name: str):
    """A number or a dictionary for what was said: presets and block-weight vectors are looked up."""
    family = "sdxl" if "text_encoder_2" in models_of(pipe) else "sd"
    if isinstance(value, str):
        try:
            return _there(pipe, preset(value, family))
        except ValueError as error:
            raise ValueError(
                f"the scale of {name!r:.60} must be a finite number, scales or a preset's name; "
                f"{str(error):.300}"
            ) from None
    if isinstance(value, Sequence):
        return _there(pipe, from_block_weights(value, family=family))
    return value


def _there(pipe, scales: Mapping) -> dict:
    """Without the components that the pipeline lacks."""
    return {part: value for part, value in scales.items() if part in models_of(pipe)}


def layer_scales(pipe, name: str, scales) -> dict[str, dict[str, float]]:
    """One number for each layer that an adapter touches, by component and module."""
    modules = {part: dict(walk(model)) for part, model in models_of(pipe).items()}
    return expand(scales, modules, name, _touched(lora_layers(pipe), name))


def _touched(layers: LoraLayers, name: str) -> dict[str, list[str]]:
    return {
        part: touched
        for part, found in layers.items()
        if (touched := [module for module, layer in found.items() if name in layer.scaling])
    }
