"""What is inside an adapter: where it changes the model, how strongly, in how many directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pandas import DataFrame
from torch.nn.utils.rnn import pad_sequence

from lorabook.lora.formats.unread import embedding_notes
from lorabook.lora.layer_stats import doubts_about, layer_table, norm_of
from lorabook.lora.metadata import shareable, training_in
from lorabook.lora.source import read_source, sha256_of
from lorabook.show.display import image_tag
from lorabook.show.tables import PlottedReport, as_html, as_text

_LINES = 8
_HEADS = ["block", "layers", "rank", "effective rank", "‖ΔW‖", "share of ‖ΔW‖²"]


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(PlottedReport):
    """What is inside an adapter; shows itself as tables and a picture.

    Its blocks are those of the UNet ("down.0" … "mid" … "up.3", "outside") and the other
    components, one each.

    Attributes:
        table: A row a layer, as `layer_table` gives them.
        format: "diffusers", "diffusers, old", "PEFT", "Kohya" or "LyCORIS".
        kinds: "LoRA", "LoCon", "LoHa", "LoKr", "full", "DoRA".
        base_model: The model that the file says it was made for, or None.
        trigger_words: What a prompt should hold.
        training: Its settings, as far as the file has them; without tokens and folders.
        notes: What was assumed and passed over, a sentence each.
        path: The file or folder; None for weights in memory.
    """

    table: DataFrame
    format: str
    kinds: tuple[str, ...]
    base_model: str | None = None
    trigger_words: tuple[str, ...] = ()
    training: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: Path | None = None

    @cached_property
    def layers(self) -> tuple:
        """The rows of the table as named tuples."""
        return tuple(self.table.itertuples(index=False, name="LayerRow"))

    @cached_property
    def blocks(self) -> dict[str, list]:
        """The same rows by block, in the order of the UNet, other components after it."""
        blocks: dict[str, list] = {}
        for row in self.layers:
            blocks.setdefault(row.block, []).append(row)
        return blocks

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
    def alphas(self) -> dict[float, int]:
        """Number of layers by alpha."""
        alphas = (self.table["scaling"] * self.table["rank"]).round(6)
        return alphas.value_counts().sort_index().to_dict()

    @property
    def scalings(self) -> dict[str, dict[float, int]]:
        """Number of layers by alpha / rank, by component."""
        scalings = self.table.groupby("component", sort=False)["scaling"]
        return {component: column.value_counts().to_dict() for component, column in scalings}

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
    def effective_ranks(self) -> dict[str, float]:
        """The mean effective rank by block."""
        blocks = self.table.groupby("block", sort=False)
        return blocks["effective_rank"].mean().fillna(0.0).to_dict()

    @property
    def spectra(self) -> dict[str, list[float]]:
        """Singular values as shares of the largest, by block, the mean over its layers.

        Blocks of zeros are absent.
        """
        trained = self.table[self.table["is_finite"] & (self.table["norm"] > 0)]
        return {
            block: pad_sequence([s / s[0] for s in spectra], batch_first=True).mean(0).tolist()
            for block, spectra in trained.groupby("block", sort=False)["spectrum"]
        }

    @cached_property
    def suspicious(self) -> dict[str, str]:
        """Layers that look wrong, by name, with the reason."""
        return doubts_about(self.table)

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
        scalings = "; ".join(f"{name} {_counts(some)}" for name, some in self.scalings.items())
        facts = [
            ("file", self._file()),
            ("format", f"{self.format}, {' and '.join(self.kinds)}"),
            ("made for", shareable(self.base_model) or "a base model its file does not name"),
            ("numbers", f"{self.numbers:,} in {len(self.layers)} layers"),
            ("rank", _counts(self.ranks)),
            ("alpha", _counts(self.alphas)),
            ("alpha / rank", scalings),
            ("‖ΔW‖", f"{self.norm:.4g}"),
            *[("trigger words", ", ".join(self.trigger_words))] * bool(self.trigger_words),
            *(("note", note) for note in self.notes),
        ]
        blocks = [
            [
                block,
                str(len(rows)),
                ", ".join(map(str, sorted({row.rank for row in rows}))),
                f"{self.effective_ranks[block]:.1f}",
                f"{self.norms[block]:.3g}",
                f"{self.shares[block]:.1%}",
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
        if len(lines) > _LINES:
            return [*lines[:_LINES], (f"and {len(lines) - _LINES} more", "see .suspicious")]
        return lines


def inspect_adapter(source, **find) -> Inspection:
    """Look into an adapter without a pipeline: where it changes the model, how strongly and how.

    Args:
        source: A file, a folder, a bundled name ("creatures"), a Hub id, an address, a TrainingRun,
            weights by key, or an Adapter.
        **find: weight_name, subfolder, revision, token, cache_dir, local_files_only, allow_pickle;
            see `read_source`.

    Returns:
        An Inspection, which shows itself. The numbers of a DoRA, PiSSA or OLoRA are those of its
        LoRA part.

    Raises:
        FileNotFoundError: If there is no such adapter.
        ValueError: As `read_source`.
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


def _norms(table: DataFrame, column: str) -> dict[str, float]:
    return (table["norm"] ** 2).groupby(table[column], sort=False).sum().pow(0.5).to_dict()


def _counts(counts: Mapping[float, int]) -> str:
    """Values and, where there are several, how many layers have each, the most frequent first."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{value:g} ({count} layers)" for value, count in ordered[:_LINES])
    return shown + ", …" * (len(ordered) > _LINES)
