"""The scales that are in force, layer by layer and summed up by block."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lorabook.blocks import block_of, place_of
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
