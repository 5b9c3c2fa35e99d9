"""What came of loading an adapter, in a form that shows itself."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorabook.live.layers import layers_of
from lorabook.lora.adapter import Adapter
from lorabook.lora.formats.read import embedding_notes
from lorabook.lora.source import sha256_of
from lorabook.show.tables import as_html


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What `load_adapter` loaded.

    Attributes:
        name: the adapter's name on the pipeline.
        path: the file or folder; None for weights in memory.
        format: "diffusers", "diffusers, old" (attention processors), "PEFT", "Kohya", "LyCORIS", "ComfyUI" or "OMI".
        kinds: "LoRA", "LoCon" (convolutions too), "LoHa", "LoKr", "DoRA", "PiSSA", "OLoRA", "full".
        base_model: the model it was made for, as it says itself, or None.
        components: by component, counts of layers by (rank, alpha, effective scale = alpha / rank), as the file has them.
        ranks: number of layers by the rank they have on the pipeline; more than the file's where the kind is no plain LoRA.
        alpha: the file's alphas that occur.
        layers: number of adapted layers by component.
        matched: how many weights of the file were used.
        ignored: keys that were not: no layer's weights, or of components that were not asked for.
        missing: what the file lacks and was assumed, a sentence each.
        trigger_words: what the prompt should hold.
        notes: what was passed over or ignored and why, a sentence each; of an embedding in the file the calls that load it.
    """

    name: str
    path: Path | None
    format: str
    kinds: tuple[str, ...]
    base_model: str | None
    components: dict[str, dict[tuple[int, float, float], int]]
    ranks: dict[int, int]
    alpha: tuple[float, ...]
    layers: dict[str, int]
    matched: int
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    trigger_words: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank on the pipeline."""
        return max(self.ranks)

    @cached_property
    def sha256(self) -> str | None:
        """The file's hash, by which sites like CivitAI know it; None for a folder or weights in memory."""
        return sha256_of(self.path) if self.path and self.path.is_file() else None

    def _rows(self) -> list[tuple[str, str]]:
        """What it says, a label and a text each."""
        parts = [
            (
                part,
                "; ".join(
                    f"{count} layers of rank {rank}, alpha {alpha:g}, scale {scale:g}"
                    for (rank, alpha, scale), count in found.items()
                ),
            )
            for part, found in self.components.items()
        ]
        unused = (
            f", {len(self.ignored)} ignored ({', '.join(self.ignored[:3])} …)"
            if self.ignored
            else ", all matched"
        )
        return [
            ("format", f"{self.format}, {' and '.join(self.kinds)}"),
            ("made for", self.base_model or "a base model its file does not name"),
            *parts,
            ("weights", f"{self.matched}{unused if not self.ignored else ' matched' + unused}"),
            *[("assumed", text) for text in self.missing],
            *[("note", text) for text in self.notes],
            *[("trigger words", ", ".join(self.trigger_words))] * bool(self.trigger_words),
        ]

    def __str__(self):
        return f"adapter {self.name!r}: " + "; ".join(
            f"{label}: {text}" for label, text in self._rows()
        )

    __repr__ = __str__

    def _repr_html_(self):
        return as_html([], [("adapter", self.name), *self._rows()])


def report_of(pipe, name: str, found, adapter: Adapter, left: list[str]) -> LoadReport:
    """The report of an adapter on a pipeline.

    Args:
        found: the Source it was read from.
        adapter: the part of it that was put on.
        left: modules that were not asked for.
    """
    components = {
        part: dict(
            Counter(
                (layer.rank, layer.alpha, layer.scaling) for layer in layers.values()
            ).most_common(4)
        )
        for part, layers in adapter.layers.items()
    }
    on = [layer for part in layers_of(pipe, name).values() for layer in part.values()]
    ignored = (*found.adapter.ignored, *left)
    parts = found.adapter.layers.keys() - adapter.layers.keys()
    notes = (
        *embedding_notes(found.adapter.ignored, found.path),
        *adapter.notes,
        *[f"{len(left)} layers of {' and '.join(sorted(parts))}, which were not asked for"]
        * bool(left),
    )
    return LoadReport(
        name=name,
        path=found.path,
        format=adapter.format,
        kinds=adapter.kinds,
        base_model=adapter.base_model,
        components=components,
        ranks=dict(sorted(Counter(layer.r[name] for layer in on).items())),
        alpha=tuple(
            sorted({layer.alpha for part in adapter.layers.values() for layer in part.values()})
        ),
        layers={part: len(layers) for part, layers in adapter.layers.items()},
        matched=sum(adapter.keys.get(part, 0) for part in adapter.layers),
        ignored=ignored,
        missing=adapter.missing,
        trigger_words=adapter.trigger_words,
        notes=notes,
    )
