"""Load an adapter of any form onto an ordinary diffusers pipeline."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusers import DiffusionPipeline
from pandas import DataFrame

from lorabook.live.inject import add_adapter
from lorabook.live.layers import adapter_names, flat, layers_of, module_name
from lorabook.live.match import by_diffusers_names, match_layers
from lorabook.live.state import fused_names, locked
from lorabook.lora.adapter import Adapter
from lorabook.lora.files import brief
from lorabook.lora.formats.keys import COMPONENTS
from lorabook.lora.formats.unread import embedding_notes
from lorabook.lora.source import Source, read_source, sha256_of
from lorabook.show.tables import Report


@dataclass(frozen=True, eq=False, repr=False)
class LoadReport(Report):
    """What `load_adapter` loaded.

    Attributes:
        name: The adapter's name on the pipeline.
        path: The file or folder; None for weights in memory.
        format: "diffusers", "diffusers, old" (attention processors), "PEFT", "Kohya", "LyCORIS",
            "ComfyUI" or "OMI".
        kinds: "LoRA", "LoCon" (convolutions too), "LoHa", "LoKr", "DoRA", "PiSSA", "OLoRA", "full".
        base_model: The model it was made for, as it says itself, or None.
        components: By component, counts of layers by (rank, alpha, effective scale = alpha / rank),
            as the file has them.
        ranks: Number of layers by the rank they have on the pipeline; more than the file's where
            the kind is no plain LoRA.
        alpha: The file's alphas that occur.
        layers: Number of adapted layers by component.
        matched: How many weights of the file were used.
        ignored: Keys that were not: no layer's weights, or of components that were not asked for.
        missing: What the file lacks and was assumed, a sentence each.
        trigger_words: What the prompt should hold.
        notes: What was passed over and why, a sentence each, and the calls for an embedding.
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
        """The file's hash, by which CivitAI knows it; None for a folder or weights in memory."""
        return sha256_of(self.path) if self.path and self.path.is_file() else None

    @property
    def table(self) -> DataFrame:
        """How many layers of each component have which rank, alpha and scale."""
        rows = [
            (component, *settings, count)
            for component, counts in self.components.items()
            for settings, count in counts.items()
        ]
        return DataFrame(rows, columns=["component", "rank", "alpha", "scale", "layers"])

    def cells(self) -> DataFrame:
        """What people read of it: labels and texts."""
        layers: dict[str, list[str]] = {}
        for row in self.table.itertuples():
            layers.setdefault(row.component, []).append(
                f"{row.layers} layers of rank {row.rank}, alpha {row.alpha:g}, scale {row.scale:g}"
            )
        matched = f"{self.matched}, all matched"
        if self.ignored:
            keys = ", ".join(self.ignored[:3])
            matched = f"{self.matched} matched, {len(self.ignored)} ignored ({keys} …)"
        lines = [
            ("format", f"{self.format}, {' and '.join(self.kinds)}"),
            ("made for", self.base_model or "a base model its file does not name"),
            *[(component, "; ".join(texts)) for component, texts in layers.items()],
            ("weights", matched),
            *[("assumed", text) for text in self.missing],
            *[("note", text) for text in self.notes],
            *[("trigger words", ", ".join(self.trigger_words))] * bool(self.trigger_words),
        ]
        return DataFrame(lines, columns=["adapter", self.name])


@locked
def load_adapter(
    pipe: DiffusionPipeline,
    source: object,
    name: str | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    components: Iterable[str] | None = None,
    hotswap_rank: int | None = None,
) -> LoadReport:
    """Load an adapter onto a pipeline, at scale 1, beside those that are there.

    It may be a LoRA, LoCon, LoHa, LoKr or DoRA, by the keys of diffusers (now and before PEFT),
    PEFT, Kohya, A1111, LyCORIS, ComfyUI or OneTrainer (OMI), and for a transformer by those of its
    original code that diffusers itself converts. Whatever is no plain LoRA is put on as one with
    the same ΔW, at the rank that needs.

    Args:
        pipe: A diffusers pipeline that can carry LoRA.
        source: A file, a folder (PEFT's too), a bundled name ("creatures"), a Hub id, an https
            address, a TrainingRun, or weights by key.
        name: The adapter's name; None takes the file's or folder's, with dots replaced.
        weight_name, subfolder, revision, token, cache_dir, local_files_only: As in
            `from_pretrained`; for an address the token is its site's.
        allow_pickle: Read an old .bin, .pt or .ckpt with `torch.load(weights_only=True)`.
        components: Which of "unet", "transformer", "text_encoder", "text_encoder_2" to take; None
            takes all the file has.
        hotswap_rank: The largest rank that `swap_adapter` will bring; prepares a model to be
            compiled once.

    Returns:
        A LoadReport, which shows itself.

    Raises:
        FileNotFoundError: If there is no such adapter.
        ValueError: For a pickle file, a damaged one, weights that are not finite, a name in use, or
            an adapter made for another architecture. The pipeline is then as before.
    """
    adapter_source = read_for(
        pipe,
        source,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    if name is not None and not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, not {name!r:.80}")
    name = module_name(name or adapter_source.name)
    if name in (*adapter_names(pipe), *fused_names(pipe)):
        raise ValueError(f"the pipeline has an adapter {name!r} already; give another name")
    where = brief(adapter_source.path or f"adapter {name!r}")
    adapter = choose_components(adapter_source.adapter, components, where)
    weights = match_layers(pipe, adapter, where)
    if hotswap_rank is not None:
        largest = max(own.rank for layers in weights.values() for own in layers.values())
        if type(hotswap_rank) is not int or hotswap_rank < largest:
            raise ValueError(
                f"hotswap_rank must be a whole number of at least {largest}, not {hotswap_rank!r}"
            )
    add_adapter(pipe, name, weights, adapter, rank=hotswap_rank)
    return report_of(pipe, name, adapter_source, adapter)


def read_for(pipe: DiffusionPipeline, source: object, **find) -> Source:
    """An adapter from anywhere, its layers named as on a pipeline; see `read_source`."""
    config = getattr(getattr(pipe, "unet", None), "config", None)
    number = getattr(config, "layers_per_block", 2)
    per_block = number if isinstance(number, int) else 2
    adapter_source = read_source(source, layers_per_block=per_block, **find)
    return adapter_source._replace(adapter=by_diffusers_names(pipe, adapter_source.adapter))


def choose_components(adapter: Adapter, components: Iterable[str] | None, where: str) -> Adapter:
    """The adapter with these components only; ValueError where none is left."""
    if components is None:
        return adapter
    chosen = [components] if isinstance(components, str) else list(components)
    for component in chosen:
        if component not in COMPONENTS:
            raise ValueError(f"unknown component {component!r}; there are: {', '.join(COMPONENTS)}")
    if not set(chosen) & adapter.layers.keys():
        raise ValueError(
            f"{where} has nothing for {', '.join(chosen)}; it has: {', '.join(adapter.layers)}"
        )
    return adapter.only(chosen)


def report_of(pipe: DiffusionPipeline, name: str, source: Source, adapter: Adapter) -> LoadReport:
    """The report of an adapter on a pipeline, of which `adapter` was put on."""
    layers = adapter.flat.values()
    omitted = source.adapter.layers.keys() - adapter.layers.keys()
    omitted_layers = [m for component in omitted for m in source.adapter.layers[component]]
    notes = [*embedding_notes(source.adapter.ignored, source.path), *adapter.notes]
    if omitted_layers:
        notes.append(
            f"{len(omitted_layers)} layers of {' and '.join(sorted(omitted))}, which were not "
            "asked for"
        )
    ranks = [layer.r[name] for layer in flat(layers_of(pipe, name))]
    settings = {
        component: Counter((layer.rank, layer.alpha, layer.scaling) for layer in modules.values())
        for component, modules in adapter.layers.items()
    }
    return LoadReport(
        name=name,
        path=source.path,
        format=adapter.format,
        kinds=adapter.kinds,
        base_model=adapter.base_model,
        components={component: dict(c.most_common(4)) for component, c in settings.items()},
        ranks=dict(sorted(Counter(ranks).items())),
        alpha=tuple(sorted({layer.alpha for layer in layers})),
        layers={component: len(modules) for component, modules in adapter.layers.items()},
        matched=sum(adapter.keys.get(component, 0) for component in adapter.layers),
        ignored=(*source.adapter.ignored, *omitted_layers),
        missing=adapter.missing,
        trigger_words=adapter.trigger_words,
        notes=tuple(notes),
    )
