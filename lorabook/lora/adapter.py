"""An adapter as plain data, whatever file it came from: layers by component and module, each with its exact ΔW."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # (up, down): (out, k) and (k, in · height · width), in float32
NEEDS = {
    "lora": ("up", "down"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b"),
    "lokr": (),
    "full": ("diff",),
}


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one layer of a model.

    Attributes:
        kind: "lora" (LoCon is LoRA on a convolution), "loha", "lokr", or "full" (the whole ΔW).
        tensors: by role. lora: up, down, mid (Tucker form); loha: w1_a, w1_b, w2_a, w2_b, t1, t2; lokr: w1 or w1_a and
            w1_b, w2 or w2_a and w2_b, t2; full: diff. Shapes are those of LyCORIS's files.
        scaling: alpha / rank, once; what the product of the tensors is multiplied by.
        rank: the rank the file speaks of.
        magnitude: DoRA's, of shape (out, 1 …) or (1, in, 1 …); None where there is none.
        start: "pissa" or "olora" where PEFT began with a part of the base model's weight and took it out there, which ΔW
            is without; None where the factors are all of it.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scaling: float = 1.0
    rank: int = 0
    magnitude: Tensor | None = None
    start: str | None = None

    @property
    def alpha(self) -> float:
        """What the scaling is called in files: scaling times rank."""
        return self.scaling * self.rank

    @property
    def is_plain(self) -> bool:
        """Whether it is up, down and alpha and nothing else, as every reader of LoRA knows."""
        return self.kind == "lora" and self.needs_base is None and "mid" not in self.tensors

    @property
    def needs_base(self) -> str | None:
        """What makes ΔW depend on the base model's weight: "DoRA", "PiSSA", "OLoRA", or None where nothing does."""
        return "DoRA" if self.magnitude is not None else _START_NAMES.get(self.start)

    def factors(self, base: Tensor | None = None) -> Factors:
        """(up, down) in float32 with up @ down = ΔW as a matrix, exactly, scaling included.

        Args:
            base: the model's own weight, which the ΔW of DoRA, PiSSA and OLoRA depends on; its device is where the
                factors are made.
        Returns: shapes (out, k) and (k, rest), where k is the rank that the kind needs: that of a LoRA, twice it for
            PiSSA and OLoRA, its square for a LoHa, up to all of min(out, rest) for LoKr, DoRA and full.
        Raises: ValueError for a DoRA, PiSSA or OLoRA without its base weight.
        """
        place = base.device if base is not None else None
        tensors = {role: value.to(place, torch.float32) for role, value in self.tensors.items()}
        up, down = _FACTORS[self.kind](tensors)
        up = up * self.scaling
        if base is None and self.needs_base:
            raise ValueError(
                f"a {self.needs_base}'s ΔW depends on the base model's weights; load it onto a pipeline first"
            )
        if self.start:
            up, down = _less_start(
                up, down, base.float().flatten(1), self.start, self.rank, self.scaling
            )
        if self.magnitude is None:
            return _at_most_full(up, down)
        return _whole(_decomposed(base.float(), up @ down, self.magnitude.to(place, torch.float32)))

    def delta(self, base: Tensor | None = None) -> Tensor:
        """ΔW as a matrix (out, in · height · width), in float32; arguments as in `factors`."""
        up, down = self.factors(base)
        return up @ down

    def map(self, change: Callable[[Tensor], Tensor]) -> "Layer":
        """The same layer with every tensor changed, as by moving it."""
        return replace(
            self,
            tensors={role: change(value) for role, value in self.tensors.items()},
            magnitude=None if self.magnitude is None else change(self.magnitude),
        )


@dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Attributes:
        layers: Layer by component ("unet", "transformer", "text_encoder", "text_encoder_2") and module, by the names of
            diffusers and transformers, those of text encoders with `text_model.` before them.
        format: what the file was: "diffusers", "diffusers, old", "PEFT", "Kohya", "LyCORIS", "ComfyUI", "OMI".
        base_model: the model it was made for, as it says itself, or None.
        trigger_words: what its prompt should hold, as it says itself.
        metadata: the file's.
        keys: number of the file's weights by component.
        ignored: keys that carry no weights of layers.
        missing: what its file lacks and was assumed, a sentence each.
        stems: by component and module, the layer's name as the file has it.
        notes: what was passed over or ignored and why, a sentence each.
    """

    layers: Mapping[str, Mapping[str, Layer]]
    format: str = "diffusers"
    base_model: str | None = None
    trigger_words: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    stems: Mapping[tuple[str, str], str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which sorts of layers it has: "LoRA", "LoCon", "LoHa", "LoKr", "full", with "DoRA", "PiSSA" and "OLoRA"."""
        return tuple(
            sorted(
                {
                    name
                    for part in self.layers.values()
                    for layer in part.values()
                    for name in _kind_names(layer)
                }
            )
        )

    def only(self, components) -> "Adapter":
        """The adapter without the other components."""
        return replace(
            self,
            layers={part: layers for part, layers in self.layers.items() if part in components},
        )


def lora(up: Tensor, down: Tensor, scaling: float = 1.0) -> Layer:
    """A plain LoRA layer from its factors; up is (out, rank, …), down (rank, in, …)."""
    return Layer("lora", {"up": up, "down": down}, scaling, down.shape[0])


def _kind_names(layer: Layer) -> list[str]:
    conv = (
        layer.kind == "lora"
        and layer.tensors["down"].dim() == 4
        and layer.tensors["down"].shape[2:].numel() > 1
    )
    name = {"lora": "LoCon" if conv else "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full"}[
        layer.kind
    ]
    return [
        name,
        *["DoRA"] * (layer.magnitude is not None),
        *[_START_NAMES.get(layer.start)] * (layer.start is not None),
    ]


def _lora(t: Mapping[str, Tensor]) -> Factors:
    down = t["down"]
    if "mid" in t:
        down = torch.einsum("mn...,nj->mj...", t["mid"], down.flatten(1))
    return t["up"].flatten(1), down.flatten(1)


def _loha(t: Mapping[str, Tensor]) -> Factors:
    (up_1, down_1), (up_2, down_2) = (_half(t, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2))
    # the entry-wise product of two low-rank matrices is a low-rank matrix of the products of their rows and columns
    return (
        (up_1[:, :, None] * up_2[:, None, :]).flatten(1),
        (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1),
    )


def _lokr(t: Mapping[str, Tensor]) -> Factors:
    (up_1, down_1), (up_2, down_2) = (
        (t[f"w{i}"].flatten(1), None) if f"w{i}" in t else _half(t, f"w{i}_a", f"w{i}_b", f"t{i}")
        for i in (1, 2)
    )
    if down_1 is None and down_2 is None:
        return _whole(torch.kron(up_1, up_2))
    downs = [
        torch.eye(up.shape[1], device=up.device) if down is None else down
        for up, down in ((up_1, down_1), (up_2, down_2))
    ]
    return torch.kron(up_1, up_2), torch.kron(*downs)


def _half(t: Mapping[str, Tensor], a: str, b: str, core: str) -> Factors:
    """One low-rank half of a LoHa or LoKr, in Tucker form where it has a core."""
    if core not in t:
        return t[a].flatten(1), t[b].flatten(1)
    return t[a].T.contiguous(), torch.einsum("ij...,jr->ir...", t[core], t[b]).flatten(1)


def _full(t: Mapping[str, Tensor]) -> Factors:
    return _whole(t["diff"].flatten(1))


def _whole(delta: Tensor) -> Factors:
    """A matrix as itself times one."""
    out, rest = delta.shape
    eye = torch.eye(min(out, rest), device=delta.device)
    return (eye, delta) if out <= rest else (delta, eye)


def _at_most_full(up: Tensor, down: Tensor) -> Factors:
    most = min(up.shape[0], down.shape[1])
    return (up, down) if up.shape[1] <= most else _whole(up @ down)


def _less_start(
    up: Tensor, down: Tensor, base: Tensor, start: str, rank: int, scaling: float
) -> Factors:
    """The factors of a LoRA less those that it began with: the base's largest singular values, or the first of its QR.

    Source: `pissa_init` and `olora_init` of PEFT, https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
    """
    if start == "pissa":  # what it began with, scaling included, is that part of the base itself
        first, values, second = torch.linalg.svd(base, full_matrices=False)
        first, second = first[:, :rank] * values[:rank], second[:rank]
    else:
        first, second = torch.linalg.qr(base)
        first, second = first[:, :rank] * scaling, second[:rank]
    return torch.cat([up, -first], 1), torch.cat([down, second])


def _decomposed(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's ΔW: the changed weight brought to the learned magnitude, less the base.

    Source: Liu et al. 2024, arXiv:2402.09353; a magnitude by input channel is what LyCORIS calls wd_on_out=False.
    """
    changed = base + delta.view_as(base)
    by_out = magnitude.shape[0] == base.shape[0]
    axes = [i for i in range(base.dim()) if i != (0 if by_out else 1)]
    shape = [-1 if i == (0 if by_out else 1) else 1 for i in range(base.dim())]
    norm = changed.square().sum(dim=axes, keepdim=True).sqrt()
    return (
        changed * (magnitude.reshape(shape) / norm.clamp_min(torch.finfo(torch.float32).eps)) - base
    ).flatten(1)


_START_NAMES = {"pissa": "PiSSA", "olora": "OLoRA"}
_FACTORS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}
