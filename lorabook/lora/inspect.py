"""What is inside an adapter, without a pipeline: where it changes the model, how strongly, in how many directions."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

from lorabook.blocks import block_map
from lorabook.lora.adapter import Adapter
from lorabook.lora.formats.read import embedding_notes
from lorabook.lora.layer_stats import LayerView, doubts_about, norm_of, views_of
from lorabook.lora.metadata import shareable, training_in
from lorabook.lora.source import read_source, sha256_of
from lorabook.show import display as mime
from lorabook.show.block_plot import WIDTH, blocks_height, draw_blocks, draw_spectra
from lorabook.show.plots import STYLE, Plot
from lorabook.show.tables import as_html, as_text

_LINES = 8
_HEADS = ["block", "layers", "rank", "effective rank", "‖ΔW‖", "share of ‖ΔW‖²"]


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_adapter` found; shows itself as tables and a picture.

    Its blocks are those of the UNet ("down.0" … "mid" … "up.3", "outside") and the other components, one each.

    Attributes:
        layers: the layers in numbers.
        format: "diffusers", "diffusers, old", "PEFT", "Kohya" or "LyCORIS".
        kinds: "LoRA", "LoCon", "LoHa", "LoKr", "full", "DoRA".
        base_model: the model it was made for, as it says itself, or None.
        trigger_words: what a prompt should hold.
        training: its settings, as far as the file tells them; without tokens and folders.
        notes: what was assumed and passed over, a sentence each.
        path: the file or folder; None for weights in memory.
    """

    layers: tuple[LayerView, ...]
    format: str
    kinds: tuple[str, ...]
    base_model: str | None = None
    trigger_words: tuple[str, ...] = ()
    training: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: Path | None = None

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
        return dict(sorted(Counter(view.rank for view in self.layers).items()))

    @property
    def alphas(self) -> dict[float, int]:
        """Number of layers by alpha."""
        return dict(
            sorted(Counter(round(view.scaling * view.rank, 6) for view in self.layers).items())
        )

    @property
    def scalings(self) -> dict[str, dict[float, int]]:
        """Number of layers by alpha / rank, by component."""
        parts = dict.fromkeys(view.component for view in self.layers)
        return {
            part: dict(Counter(view.scaling for view in self.layers if view.component == part))
            for part in parts
        }

    @property
    def numbers(self) -> int:
        """How many numbers the file holds for its layers, alphas aside."""
        return sum(view.numbers for view in self.layers)

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖ of all layers."""
        return norm_of(self.layers)

    @cached_property
    def blocks(self) -> dict[str, list[LayerView]]:
        """The layers by block, in the order of the UNet, other components after it."""
        order = [
            *block_map(view.module for view in self.layers if view.component == "unet"),
            *(view.component for view in self.layers if view.component != "unet"),
        ]
        return {
            block: [view for view in self.layers if view.block == block]
            for block in dict.fromkeys(order)
        }

    @cached_property
    def norms(self) -> dict[str, float]:
        """‖ΔW‖ by block."""
        return {block: norm_of(views) for block, views in self.blocks.items()}

    @cached_property
    def places(self) -> dict[str, float]:
        """‖ΔW‖ by part of a block, as "down.0.attentions_1", "mid.resnets_0" and "up.1.sampler"."""
        places: dict[str, list[LayerView]] = {}
        for view in (view for views in self.blocks.values() for view in views):
            places.setdefault(view.place, []).append(view)
        return {place: norm_of(views) for place, views in places.items()}

    @property
    def shares(self) -> dict[str, float]:
        """What each block has of the energy ‖ΔW‖² of all; they sum to 1, or are all 0 where there is none."""
        return {block: (norm / (self.norm or 1)) ** 2 for block, norm in self.norms.items()}

    @cached_property
    def effective_ranks(self) -> dict[str, float]:
        """The mean effective rank by block."""
        return {
            block: fmean([view.effective_rank for view in views if view.is_finite] or [0.0])
            for block, views in self.blocks.items()
        }

    @cached_property
    def spectra(self) -> dict[str, list[float]]:
        """Singular values as shares of the largest, by block, the mean over its layers; blocks of zeros are absent."""
        live = {
            block: [
                view.spectrum / view.spectrum[0] for view in views if view.is_finite and view.norm
            ]
            for block, views in self.blocks.items()
        }
        return {
            block: pad_sequence(found, batch_first=True).mean(0).tolist()
            for block, found in live.items()
            if found
        }

    @cached_property
    def suspicious(self) -> dict[str, str]:
        """Layers that look wrong, by name, with the reason."""
        return doubts_about(self.layers)

    def plot(self) -> Plot:
        """One figure: ‖ΔW‖ on the UNet's shape, each block's share of the energy beside it, and the spectra by block."""
        heights = [blocks_height(self.places)] + [3.4] * bool(self.spectra)
        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, sum(heights)))
            parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
            shares = {block: f"{share:.1%}" for block, share in self.shares.items()}
            alt = draw_blocks(
                parts[0],
                self.places,
                title="Where the adapter changes the model",
                notes=shares,
                label="‖ΔW‖ (beside each block its share of all ‖ΔW‖²)",
            )
            if self.spectra:
                alt += " " + draw_spectra(
                    parts[1], self.spectra, title="Singular values of ΔW, mean by block"
                )
        return Plot(figure, alt)

    @cached_property
    def _shown(self) -> tuple[bytes, str]:
        plot = self.plot()
        return plot._repr_png_(), plot.alt

    def _repr_png_(self) -> bytes:
        return self._shown[0]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return mime.bundle(*self._shown)

    def _file(self) -> str:
        if self.path is None:
            return "weights in memory"
        kept = (
            self.path.parent.name == "snapshots"
        )  # a commit in the Hub's cache, which the repository's name is above
        name = self.path.parents[1].name.split("--")[-1] if kept else self.path.name
        return f"{name}, {self.size / 1e6:.1f} MB" + (
            f", SHA-256 {self.sha256[:10]}…" if self.sha256 else ""
        )

    def _facts(self) -> list[tuple[str, str]]:
        scales = "; ".join(f"{part} {_counted(found)}" for part, found in self.scalings.items())
        return [
            ("file", self._file()),
            ("format", f"{self.format}, {' and '.join(self.kinds)}"),
            ("made for", shareable(self.base_model) or "a base model its file does not name"),
            ("numbers", f"{self.numbers:,} in {len(self.layers)} layers"),
            ("rank", _counted(self.ranks)),
            ("alpha", _counted(self.alphas)),
            ("alpha / rank", scales),
            ("‖ΔW‖", f"{self.norm:.4g}"),
            *[("trigger words", ", ".join(self.trigger_words))] * bool(self.trigger_words),
            *(("note", note) for note in self.notes),
        ]

    def _table(self) -> list[list[str]]:
        return [
            [
                block,
                str(len(views)),
                ", ".join(str(rank) for rank in sorted({view.rank for view in views})),
                f"{self.effective_ranks[block]:.1f}",
                f"{self.norms[block]:.3g}",
                f"{self.shares[block]:.1%}",
            ]
            for block, views in self.blocks.items()
        ]

    def _doubts(self) -> list[tuple[str, str]]:
        """A line for each reason, with its first layer and how many more there are; the first lines only."""
        names: dict[str, list[str]] = {}
        for name, reason in self.suspicious.items():
            names.setdefault(reason, []).append(name)
        lines = [
            (found[0] + f" and {len(found) - 1} more" * bool(found[1:]), reason)
            for reason, found in names.items()
        ]
        return lines[:_LINES] + [(f"and {len(lines) - _LINES} more", "see .suspicious")] * (
            len(lines) > _LINES
        )

    def _sections(self) -> list[tuple[str, list[str], list]]:
        """Title, heads and rows of each table; those without rows are left out."""
        sections = [
            ("", [], self._facts()),
            ("By block", _HEADS, self._table()),
            ("Suspicious layers", [], self._doubts()),
            ("Training", [], [*self.training.items()]),
        ]
        return [section for section in sections if section[2]]

    def __str__(self):
        return "\n\n".join(
            f"{title}\n{as_text(heads, rows)}".strip() for title, heads, rows in self._sections()
        )

    __repr__ = __str__

    def _repr_html_(self):
        return mime.image_tag(*self._shown) + "".join(
            f"<p><b>{title}</b></p>" * bool(title) + as_html(heads, rows)
            for title, heads, rows in self._sections()
        )


def inspect_adapter(source, **find) -> Inspection:
    """Look into an adapter without a pipeline: what it is, where it changes the model, how strongly and how.

    Args:
        source: a file, a folder, a bundled name ("creatures"), a Hub id, an address, a TrainingRun, weights by key, or an
            Adapter.
        **find: weight_name, subfolder, revision, token, cache_dir, local_files_only, allow_pickle; see `read_source`.
    Returns: an Inspection, which shows itself. The numbers of a DoRA, PiSSA or OLoRA are those of its LoRA
        part.
    Raises: FileNotFoundError if there is no such adapter; ValueError as `read_source`.
    """
    found = read_source(source, **find)
    return inspect(found.adapter, found.path)


def inspect(adapter: Adapter, path: Path | None = None) -> Inspection:
    """What `inspect_adapter` does, for an adapter that was read already."""
    notes = [f"{text} (assumed)" for text in adapter.missing]
    notes += [*embedding_notes(adapter.ignored, path), *adapter.notes]
    notes += [
        f"a {kind}'s ΔW depends on its base model; all numbers are of its LoRA part"
        for kind in adapter.kinds
        if kind in ("DoRA", "OLoRA", "PiSSA")
    ]
    return Inspection(
        views_of(adapter),
        adapter.format,
        adapter.kinds,
        adapter.base_model,
        adapter.trigger_words,
        training_in(adapter.metadata),
        tuple(notes),
        path,
    )


def _counted(found: dict[float, int]) -> str:
    """Values and, where there are several, how many layers have each, the most frequent first."""
    if len(found) == 1:
        return f"{next(iter(found)):g}"
    most = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{value:g} ({count} layers)" for value, count in most[:_LINES]) + ", …" * (
        len(most) > _LINES
    )
