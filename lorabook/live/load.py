"""Load an adapter of any form onto an ordinary diffusers pipeline."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorabook.live.inject import add_adapter
from lorabook.live.layers import adapter_names, layers_of, module_name
from lorabook.live.match import match_layers
from lorabook.live.state import fused_names, locked
from lorabook.live.transformer_keys import by_diffusers_names
from lorabook.lora.adapter import Adapter
from lorabook.lora.formats.keys import COMPONENTS
from lorabook.lora.formats.read import embedding_notes
from lorabook.lora.source import Source, brief, read_source, sha256_of
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


@locked
def load_adapter(
    pipe,
    source,
    name: str | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    components: Iterable[str] | None = None,
    allow_pickle: bool = False,
    hotswap_rank: int | None = None,
) -> LoadReport:
    """Load an adapter onto a pipeline, at scale 1, beside those that are there.

    It may be a LoRA, LoCon, LoHa, LoKr or DoRA, by the keys of diffusers (now and before PEFT), PEFT, Kohya, A1111,
    LyCORIS, ComfyUI or OneTrainer (OMI), and for a transformer by those of its original code that diffusers itself converts.
    Whatever is no plain LoRA is put on as one with the same ΔW, at the rank that needs.

    Args:
        pipe: a diffusers pipeline that can carry LoRA.
        source: a file, a folder (PEFT's too), a bundled name ("creatures"), a Hub id, an https address, a TrainingRun, or
            weights by key.
        name: the adapter's name; None takes the file's or folder's, with dots replaced (see `module_name`).
        weight_name, subfolder, revision, token, cache_dir, local_files_only: as in `from_pretrained`; for an address the
            token is its site's.
        components: which of "unet", "transformer", "text_encoder", "text_encoder_2" to take; None takes all the file has.
        allow_pickle: read an old .bin, .pt or .ckpt with `torch.load(weights_only=True)`.
        hotswap_rank: the largest rank that `swap_adapter` will bring; prepares a model to be compiled once.
    Returns: a LoadReport, which shows itself.
    Raises: FileNotFoundError if there is no such adapter; ValueError for a pickle file, a damaged one, weights that
        are not finite, a name in use, or an adapter made for another architecture. The pipeline is then as before.
    """
    found = read_for(
        pipe,
        source,
        allow_pickle=allow_pickle,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if name is not None and not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, not {name!r:.80}")
    name = module_name(name or found.name)
    if name in (*adapter_names(pipe), *fused_names(pipe)):
        raise ValueError(
            f"the pipeline has an adapter {name!r} already; give this one another name"
        )
    where = brief(found.path or f"adapter {name!r}")
    adapter = chosen(found.adapter, components, where)
    weights = match_layers(pipe, adapter, where)
    if hotswap_rank is not None:
        _check_room(weights, hotswap_rank)
    add_adapter(pipe, name, weights, adapter, rank=hotswap_rank, source=source)
    return report(pipe, name, found, adapter)


def report(pipe, name: str, found: Source, adapter: Adapter) -> LoadReport:
    """What was loaded, from what was read and what arrived."""
    left = [
        key
        for part in found.adapter.layers.keys() - adapter.layers.keys()
        for key in found.adapter.layers[part]
    ]
    return report_of(pipe, name, found, adapter, left)


def read_for(pipe, source, **find) -> Source:
    """An adapter from anywhere, by the names that layers have on a pipeline; arguments as in `read_source`."""
    found = read_source(source, layers_per_block=_layers_per_block(pipe), **find)
    return found._replace(adapter=by_diffusers_names(pipe, found.adapter))


def _layers_per_block(pipe) -> int:
    """Of a pipeline's UNet; 2 where it says nothing."""
    number = getattr(getattr(getattr(pipe, "unet", None), "config", None), "layers_per_block", 2)
    return number if isinstance(number, int) else 2


def chosen(adapter: Adapter, components: Iterable[str] | None, where: str) -> Adapter:
    """The adapter with these components only. Raises ValueError for unknown ones, or where none is left."""
    if components is None:
        return adapter
    wanted = [components] if isinstance(components, str) else list(components)
    for part in wanted:
        if part not in COMPONENTS:
            raise ValueError(
                f"unknown component {part!r}; the components are: {', '.join(COMPONENTS)}"
            )
    if not set(wanted) & adapter.layers.keys():
        raise ValueError(
            f"{where} has nothing for {', '.join(wanted)}; it has: {', '.join(adapter.layers)}"
        )
    return adapter.only(wanted)


def _check_room(ready, rank: int) -> None:
    most = max(made.rank for layers in ready.values() for made in layers.values())
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < most:
        raise ValueError(
            f"hotswap_rank must be a whole number of at least {most}, this adapter's rank; not {rank!r}"
        )


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
