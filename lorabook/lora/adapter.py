"""An adapter as plain data: layers by component and module, each with its exact ΔW."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # (up, down): (out, k) and (k, in · height · width), in float32
Bases = Mapping[str, Mapping[str, Tensor]]  # the model's own weights, by component and module
NEEDS = {
    "lora": ("up", "down"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b"),
    "lokr": (),
    "full": ("diff",),
}
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full"}
_STARTS = {"pissa": "PiSSA", "olora": "OLoRA"}


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one layer of a model.

    Attributes:
        kind: "lora" (LoCon is LoRA on a convolution), "loha", "lokr", or "full" (the whole ΔW).
        tensors: By role, in the shapes of LyCORIS's files. lora: up, down, mid (Tucker form); loha:
            w1_a, w1_b, w2_a, w2_b, t1, t2; lokr: w1 or w1_a and w1_b, w2 or w2_a and w2_b, t2;
            full: diff.
        scaling: alpha / rank; the product of the tensors is multiplied by it once.
        rank: The rank that the file names.
        magnitude: DoRA's, of shape (out, 1 …) or (1, in, 1 …).
        start: "pissa" or "olora" where PEFT began with a part of the base model's weight and took
            it out there; ΔW is without that part.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scaling: float = 1.0
    rank: int = 0
    magnitude: Tensor | None = None
    start: str | None = None

    @property
    def alpha(self) -> float:
        """What files hold in place of the scaling: scaling times rank."""
        return self.scaling * self.rank

    @property
    def is_plain(self) -> bool:
        """Whether it is up, down and alpha alone, which every reader of LoRA knows."""
        return self.kind == "lora" and self.needs_base is None and "mid" not in self.tensors

    @property
    def needs_base(self) -> str | None:
        """Why ΔW depends on the base model's weight: "DoRA", "PiSSA", "OLoRA", or None."""
        return "DoRA" if self.magnitude is not None else _STARTS.get(self.start)

    @property
    def kinds(self) -> set[str]:
        """What it is called, as {"LoCon", "DoRA"}; see `Adapter.kinds`."""
        is_conv = self.kind == "lora" and self.tensors["down"].shape[2:].numel() > 1
        dora = None if self.magnitude is None else "DoRA"
        return {"LoCon" if is_conv else _KINDS[self.kind], dora, _STARTS.get(self.start)} - {None}

    def factors(self, base: Tensor | None = None) -> Factors:
        """(up, down) in float32 with up @ down = ΔW as a matrix, exactly, scaling included.

        Shapes (out, k) and (k, rest), on the device of `base`, the model's own weight, without
        which a DoRA, PiSSA or OLoRA is a ValueError. k is the rank that the kind needs: that of a
        LoRA, twice it for PiSSA and OLoRA, its square for a LoHa, up to min(out, rest) for others.
        """
        if base is None and self.needs_base:
            raise ValueError(
                f"a {self.needs_base}'s ΔW depends on the base model's weights; load it onto one"
            )
        layer = self.to_float32(base)
        up, down = _FACTORS[self.kind](layer.tensors)
        up = up * self.scaling
        base = None if base is None else base.to(up.device, torch.float32)
        if self.start:
            first, second = _start_factors(self, base.flatten(1))
            up, down = torch.cat([up, -first], 1), torch.cat([down, second])
        if self.magnitude is not None:
            return _whole(_dora_delta(base, up @ down, layer.magnitude))
        return _whole(up @ down) if up.shape[1] > min(len(up), down.shape[1]) else (up, down)

    def delta(self, base: Tensor | None = None) -> Tensor:
        """ΔW as a matrix (out, in · height · width), in float32; `base` as in `factors`."""
        up, down = self.factors(base)
        return up @ down

    def to_float32(self, base: Tensor | None = None) -> "Layer":
        """The same layer as arithmetic wants it, on the device of its base weight.

        Apple's GPU has no float64, which an SVD wants; the CPU takes its place.
        """
        device = next(iter(self.tensors.values())).device if base is None else base.device
        device = "cpu" if device.type == "mps" else device
        return self.map(lambda value: value.to(device, torch.float32))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Layer":
        """The same layer with every tensor changed, as by moving it."""
        tensors = {role: change(value) for role, value in self.tensors.items()}
        magnitude = None if self.magnitude is None else change(self.magnitude)
        return replace(self, tensors=tensors, magnitude=magnitude)


@dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Its layers stand by component ("unet", "transformer", "text_encoder", "text_encoder_2") and
    module, by the names of diffusers and transformers, those of text encoders with `text_model.`.
    """

    layers: Mapping[str, Mapping[str, Layer]]
    format: str = "diffusers"  # or "diffusers, old", "PEFT", "Kohya", "LyCORIS", "ComfyUI", "OMI"
    base_model: str | None = None  # that the file says it was made for
    trigger_words: tuple[str, ...] = ()  # that the file says its prompt should hold
    metadata: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)  # number of weights by component
    ignored: tuple[str, ...] = ()  # keys that carry no weights of layers
    missing: tuple[str, ...] = ()  # what its file lacks and was assumed, a sentence each
    # by component and module, the layer's name as the file has it
    stems: Mapping[tuple[str, str], str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was passed over or ignored and why, a sentence each
    source: str | None = None  # path, id or address that it was read from

    @property
    def flat(self) -> dict[tuple[str, str], Layer]:
        """Its layers by (component, module)."""
        return {
            (component, module): layer
            for component, layers in self.layers.items()
            for module, layer in layers.items()
        }

    @property
    def rank(self) -> int:
        """The largest rank of its layers; 0 without layers."""
        return max((layer.rank for layer in self.flat.values()), default=0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of "LoRA", "LoCon", "LoHa", "LoKr", "full", "DoRA", "PiSSA" and "OLoRA" those it has."""
        return tuple(sorted(set().union(*(layer.kinds for layer in self.flat.values()))))

    def only(self, components: Iterable[str]) -> "Adapter":
        """The adapter without the other components."""
        return replace(self, layers={c: v for c, v in self.layers.items() if c in components})

    def map(self, change: Callable[[str, str, Layer], Layer]) -> "Adapter":
        """The same adapter with every layer changed; `change` takes component, module and layer."""
        layers = {component: {} for component in self.layers}
        for (component, module), layer in self.flat.items():
            layers[component][module] = change(component, module, layer)
        return replace(self, layers=layers)


def lora(up: Tensor, down: Tensor, scaling: float = 1.0) -> Layer:
    """A plain LoRA layer from its factors; up is (out, rank, …), down (rank, in, …)."""
    return Layer("lora", {"up": up, "down": down}, scaling, down.shape[0])


def _lora_factors(t: Mapping[str, Tensor]) -> Factors:
    down = t["down"]
    if "mid" in t:
        down = torch.einsum("mn...,nj->mj...", t["mid"], down.flatten(1))
    return t["up"].flatten(1), down.flatten(1)


def _loha_factors(t: Mapping[str, Tensor]) -> Factors:
    (up_1, down_1), (up_2, down_2) = _half(t, 1), _half(t, 2)
    # the entry-wise product of two low-rank matrices is a low-rank matrix: of the products of
    # their rows and of their columns
    up = up_1[:, :, None] * up_2[:, None, :]
    down = down_1[:, None, :] * down_2[None, :, :]
    return up.flatten(1), down.flatten(0, 1)


def _lokr_factors(t: Mapping[str, Tensor]) -> Factors:
    if "w1" in t and "w2" in t:
        return _whole(torch.kron(t["w1"].flatten(1), t["w2"].flatten(1)))
    (up_1, down_1), (up_2, down_2) = _half(t, 1), _half(t, 2)
    return torch.kron(up_1, up_2), torch.kron(down_1, down_2)


def _half(t: Mapping[str, Tensor], number: int) -> Factors:
    """One half of a LoHa or LoKr, in Tucker form where it has a core."""
    if f"w{number}" in t:
        up = t[f"w{number}"].flatten(1)
        return up, torch.eye(up.shape[1], device=up.device)
    a, b, core = t[f"w{number}_a"], t[f"w{number}_b"], t.get(f"t{number}")
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T.contiguous(), torch.einsum("ij...,jr->ir...", core, b).flatten(1)


def _full_factors(t: Mapping[str, Tensor]) -> Factors:
    return _whole(t["diff"].flatten(1))


def _whole(delta: Tensor) -> Factors:
    """A matrix as itself times one."""
    out, rest = delta.shape
    eye = torch.eye(min(out, rest), device=delta.device)
    return (eye, delta) if out <= rest else (delta, eye)


def _start_factors(layer: Layer, base: Tensor) -> Factors:
    """What PiSSA and OLoRA began with: the base's largest singular values, or the first of its QR.

    Source: `pissa_init` and `olora_init` of PEFT,
    https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
    """
    rank = layer.rank
    if layer.start == "olora":
        first, second = torch.linalg.qr(base)
        return first[:, :rank] * layer.scaling, second[:rank]
    first, values, second = torch.linalg.svd(base, full_matrices=False)
    return first[:, :rank] * values[:rank], second[:rank]  # a part of the base, scaling included


def _dora_delta(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's ΔW: the changed weight, brought to the learned magnitude, less the base.

    Source: Liu et al. 2024, arXiv:2402.09353; a magnitude by input is LyCORIS's wd_on_out=False.
    """
    changed = base + delta.view_as(base)
    axis = 0 if magnitude.shape[0] == base.shape[0] else 1
    others = [i for i in range(base.dim()) if i != axis]
    norm = changed.square().sum(dim=others, keepdim=True).sqrt()
    ratio = magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).eps)
    return (changed * ratio - base).flatten(1)


_FACTORS = {
    "lora": _lora_factors,
    "loha": _loha_factors,
    "lokr": _lokr_factors,
    "full": _full_factors,
}
