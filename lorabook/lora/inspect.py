"""What is inside an adapter: where it changes the model, how strongly, in how many directions."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from pandas import DataFrame, Series
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorabook.blocks import block_of, group_by_block, kind_of, place_of
from lorabook.lora.adapter import Adapter, Layer
from lorabook.lora.formats.unread import embedding_notes
from lorabook.lora.metadata import shareable, training_in
from lorabook.lora.source import read_source, sha256_of
from lorabook.lowrank import effective_rank, singular_values
from lorabook.show.display import image_tag
from lorabook.show.tables import PlottedReport, as_html, as_text

TOO_STRONG = 10  # times the median norm of the layers of its kind
TOO_NARROW = 0.1  # of the rank; an effective rank below is suspicious
SCALINGS = (0.01, 100)  # alpha / rank outside of these is hardly meant so
_LINES = 8
_HEADS = ["block", "layers", "rank", "effective rank", "‖ΔW‖", "share of ‖ΔW‖²"]


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(PlottedReport):
    """What is inside an adapter; shows itself as tables and a picture.

    Its blocks are those of the UNet ("down.0" … "mid" … "up.3", "outside") and the other
    components, one each.
    """

    table: DataFrame  # a row a layer, as `layer_table` gives them
    format: str
    kinds: tuple[str, ...]  # "LoRA", "LoCon", "LoHa", "LoKr", "full", "DoRA"
    base_model: str | None = None  # the model that the file says it was made for
    trigger_words: tuple[str, ...] = ()
    training: dict[str, str] = field(default_factory=dict)  # without tokens and folders
    notes: tuple[str, ...] = ()  # what was assumed and passed over, a sentence each
    path: Path | None = None  # the file or folder; None for weights in memory

    @cached_property
    def layers(self) -> tuple:
        """The rows of the table as named tuples."""
        return tuple(self.table.itertuples(index=False, name="LayerRow"))

    @property
    def blocks(self) -> dict[str, list]:
        """The same rows by block, in the order of the UNet, other components after it."""
        names = dict.fromkeys(self.table["block"])
        return {name: [row for row in self.layers if row.block == name] for name in names}

    @cached_property
    def sha256(self) -> str | None:
        """The file's hash, by which sites know it; None for a folder or weights in memory."""
        return sha256_of(self.path) if self.path and self.path.is_file() else None

    @property
    def size(self) -> int | None:
        """Bytes of the file, or of the folder's adapter files; None for weights in memory."""
        if self.path is None:
            return None
        files = [self.path] if self.path.is_file() else self.path.rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    @property
    def ranks(self) -> dict[int, int]:
        """Number of layers by rank; 0 is a layer whose whole ΔW is in the file."""
        return self.table["rank"].value_counts().sort_index().to_dict()

    @property
    def numbers(self) -> int:
        """How many numbers the file holds for its layers, alphas aside."""
        return int(self.table["numbers"].sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖ of all layers."""
        return norm_of(self.table)

    @property
    def norms(self) -> dict[str, float]:
        """‖ΔW‖ by block."""
        return _norms(self.table, "block")

    @property
    def places(self) -> dict[str, float]:
        """‖ΔW‖ by part of a block, as "mid.resnets_0" and "up.1.sampler"."""
        return _norms(self.table, "place")

    @property
    def shares(self) -> dict[str, float]:
        """Each block's share of the energy ‖ΔW‖²; they sum to 1, or are all 0 without any."""
        return {block: (norm / (self.norm or 1)) ** 2 for block, norm in self.norms.items()}

    @property
    def spectra(self) -> dict[str, list[float]]:
        """Singular values as shares of the largest, by block, the mean over its layers."""
        trained = self.table[self.table["is_finite"] & (self.table["norm"] > 0)]
        return {
            block: pad_sequence([s / s[0] for s in spectra], batch_first=True).mean(0).tolist()
            for block, spectra in trained.groupby("block", sort=False)["spectrum"]
        }

    @cached_property
    def suspicious(self) -> dict[str, str]:
        """Layers that look wrong, by name, with the reason."""
        sorts = self.table["component"] + "'s " + self.table["module"].map(kind_of)
        norms = self.table["norm"].where(self.table["norm"] > 0)
        usual = norms.groupby(sorts).transform("median")
        rows = self.table.assign(sort=sorts, usual=usual).itertuples(index=False)
        return {row.name: reason for row in rows if (reason := _doubt(row))}

    def plot(self):
        """One figure: ‖ΔW‖ on the UNet's shape, each block's share of the energy, the spectra."""
        from lorabook.show.block_plot import plot_adapter

        return plot_adapter(self.places, self.shares, self.spectra)

    def __str__(self) -> str:
        sections = self._sections()
        return "\n\n".join(f"{title}\n{as_text(*rows)}".strip() for title, *rows in sections)

    def _repr_html_(self) -> str:
        tables = [
            f"<p><b>{title}</b></p>" * bool(title) + as_html(*rows)
            for title, *rows in self._sections()
        ]
        return image_tag(*self._picture) + "".join(tables)

    def _file(self) -> str:
        if self.path is None:
            return "weights in memory"
        is_commit = self.path.parent.name == "snapshots"  # in the Hub's cache
        name = self.path.parents[1].name.split("--")[-1] if is_commit else self.path.name
        checksum = f", SHA-256 {self.sha256[:10]}…" if self.sha256 else ""
        return f"{name}, {self.size / 1e6:.1f} MB{checksum}"

    def _sections(self) -> list[tuple[str, list[str], list]]:
        """Title, heads and rows of each table; those without rows are left out."""
        facts = [
            ("file", self._file()),
            ("format", f"{self.format}, {' and '.join(self.kinds)}"),
            ("made for", shareable(self.base_model) or "a base model its file does not name"),
            ("numbers", f"{self.numbers:,} in {len(self.layers)} layers"),
            ("rank", _counts(self.table["rank"])),
            ("alpha", _counts(self.table["scaling"] * self.table["rank"])),
            ("alpha / rank", _counts(self.table["scaling"])),
            ("‖ΔW‖", f"{self.norm:.4g}"),
            *[("trigger words", ", ".join(self.trigger_words))] * bool(self.trigger_words),
            *(("note", note) for note in self.notes),
        ]
        widths = self.table.groupby("block", sort=False)["effective_rank"].mean().fillna(0.0)
        norms, shares = self.norms, self.shares
        blocks = [
            [
                block,
                str(len(rows)),
                ", ".join(map(str, sorted({row.rank for row in rows}))),
                f"{widths[block]:.1f}",
                f"{norms[block]:.3g}",
                f"{shares[block]:.1%}",
            ]
            for block, rows in self.blocks.items()
        ]
        sections = [
            ("", [], facts),
            ("By block", _HEADS, blocks),
            ("Suspicious layers", [], self._doubts()),
            ("Training", [], [*self.training.items()]),
        ]
        return [section for section in sections if section[2]]

    def _doubts(self) -> list[tuple[str, str]]:
        """A line a reason, with its first layer and how many more there are."""
        names: dict[str, list[str]] = {}
        for name, reason in self.suspicious.items():
            names.setdefault(reason, []).append(name)
        lines = [
            (first + f" and {len(others)} more" * bool(others), reason)
            for reason, (first, *others) in names.items()
        ]
        return lines[:_LINES] + [("and more", "see .suspicious")] * (len(lines) > _LINES)


def inspect_adapter(source, **find) -> Inspection:
    """Look into an adapter without a pipeline: where it changes the model, how strongly and how.

    Args:
        source: Anything that `load_adapter` takes, or an Adapter.
        **find: As in `load_adapter`.

    Returns:
        An Inspection, which shows itself. The numbers of a DoRA, PiSSA or OLoRA are those of its
        LoRA part.

    Raises:
        FileNotFoundError, ValueError: As `load_adapter`.
    """
    read = read_source(source, **find)
    adapter = read.adapter
    notes = [f"{text} (assumed)" for text in adapter.missing]
    notes += [*embedding_notes(adapter.ignored, read.path), *adapter.notes]
    for kind in sorted({"DoRA", "OLoRA", "PiSSA"} & {*adapter.kinds}):
        notes.append(f"a {kind}'s ΔW depends on its base model; all numbers are of its LoRA part")
    return Inspection(
        layer_table(adapter),
        adapter.format,
        adapter.kinds,
        adapter.base_model,
        adapter.trigger_words,
        training_in(adapter.metadata),
        tuple(notes),
        read.path,
    )


def layer_table(adapter: Adapter) -> DataFrame:
    """The layers of an adapter in numbers, a row each, by block in the order of the UNet.

    Where the file holds the whole ΔW, the rank is 0; where it is not finite, the norm is NaN.
    """
    layers = adapter.flat
    places = [place for block in group_by_block(layers).values() for place in block]
    return DataFrame([_row(*place, layers[place]) for place in places])


def norm_of(table: DataFrame) -> float:
    """‖ΔW‖ of the layers in a `layer_table` together, those left out that are not finite."""
    return float((table["norm"] ** 2).sum() ** 0.5)


def _doubt(row) -> str:
    if not row.is_finite:
        return "has weights that are not finite; its training failed"
    if not SCALINGS[0] <= abs(row.scaling) <= SCALINGS[1]:
        return f"alpha / rank is {row.scaling:g}; alpha was hardly meant so"
    if not row.norm:
        return "ΔW is all zeros, so it does nothing"
    if row.norm > TOO_STRONG * row.usual:
        return f"‖ΔW‖ is {row.norm / row.usual:.0f} times the median of {row.sort} layers"
    rank = min(row.rank, len(row.spectrum))
    if row.kind == "lora" and row.effective_rank < TOO_NARROW * rank:
        return f"its effective rank is {row.effective_rank:.1f}, far below its rank of {row.rank}"
    return ""


def _row(component: str, module: str, layer: Layer) -> dict[str, object]:
    tensors = [*layer.tensors.values(), *([layer.magnitude] if layer.magnitude is not None else [])]
    is_finite = all(tensor.isfinite().all() for tensor in tensors)
    spectrum = _spectrum(layer) if is_finite else torch.tensor([float("nan")])
    block = place = component
    if component == "unet":
        block = place = block_of(module)
        if where := place_of(module):
            _, part, number = where
            place = f"{block}.sampler" if part == "samplers" else f"{block}.{part}_{number}"
    return {
        "component": component,
        "module": module,
        "name": f"{component}.{module}",
        "block": block,
        "place": place,  # as "down.0.attentions_1"
        "kind": layer.kind,
        "rank": layer.rank,
        "scaling": layer.scaling,
        "numbers": sum(tensor.numel() for tensor in tensors),
        "spectrum": spectrum,  # the singular values of ΔW, falling
        "is_finite": is_finite,
        "norm": float(spectrum.double().norm()),
        "effective_rank": effective_rank(spectrum) if is_finite else float("nan"),
    }


def _spectrum(layer: Layer) -> Tensor:
    layer = replace(layer, magnitude=None, start=None)
    if layer.kind == "lokr" and {"w1", "w2"} <= layer.tensors.keys():
        # a Kronecker product's singular values are the products of those of its factors
        halves = (layer.tensors[role].float().flatten(1) for role in ("w1", "w2"))
        one, two = (torch.linalg.svdvals(half) for half in halves)
        return abs(layer.scaling) * torch.outer(one, two).flatten().sort(descending=True)[0]
    return singular_values(*layer.factors())


def _norms(table: DataFrame, column: str) -> dict[str, float]:
    return (table["norm"] ** 2).groupby(table[column], sort=False).sum().pow(0.5).to_dict()


def _counts(column: Series) -> str:
    """Values and, where there are several, how many layers have each, the most frequent first."""
    counts = column.round(6).value_counts()
    if len(counts) == 1:
        return f"{counts.index[0]:g}"
    ordered = [f"{value:g} ({count} layers)" for value, count in counts.items()]
    return ", ".join(ordered[:_LINES]) + ", …" * (len(ordered) > _LINES)
