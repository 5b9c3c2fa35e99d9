"""Weights by whatever keys, read into the neutral form."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lorabook.lora.adapter import NEEDS, Adapter, Layer
from lorabook.lora.formats.keys import form_of, parse_key
from lorabook.lora.formats.peft_settings import component_in, is_left_out, settings_of, start_of
from lorabook.lora.formats.unread import notes_on_unread, other_kind
from lorabook.lora.shapes import matrix_shape
from lorabook.upstream import pattern_value


@dataclass
class _Group:
    """The tensors of one layer by role, the layer's kind, and its name in the file."""

    stem: str
    kind: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def parse(
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    configs: Mapping[str | None, Mapping] | None = None,
    layers_per_block: int = 2,
    where: str = "the adapter",
) -> Adapter:
    """Read an adapter from its weights; without base model and trigger words.

    `configs` is what PEFT's adapter_config.json holds, by component or None for all. ValueError
    where there are no weights of layers, a layer lacks some, or something that is not read here
    would change the image.
    """
    metadata = dict(metadata or {})
    settings, notes = settings_of(configs, metadata, where)
    groups, ignored = _grouped(weights, _only_component(weights, settings), layers_per_block, where)
    is_lora = any(group.kind for group in groups.values())
    is_ip_adapter = any(key.startswith(("image_proj.", "ip_adapter.")) for key in weights)
    if (is_ip_adapter or not is_lora) and (sentence := other_kind(weights, where)):
        raise ValueError(sentence)
    notes = [*notes, *notes_on_unread(weights, ignored, where)]
    if not is_lora:
        example = f", for example {ignored[0]:.100}" if ignored else ""
        raise ValueError(
            f"{where} is not a LoRA: none of its {len(weights)} keys names a low-rank weight"
            f"{example}"
        )
    layers: dict[str, dict[str, Layer]] = {}
    without_alpha = left_out = other_rank = 0
    for (component, module), group in groups.items():
        config = settings.get(component, settings.get(None, {}))
        # diffusers, whose metadata hold the same settings, goes by the weights
        if configs and is_left_out(config, module):
            ignored.append(f"{component}.{module}")
            left_out += 1
            continue
        layer, has_alpha = _layer(module, group, config, where)
        layers.setdefault(component, {})[module] = layer
        without_alpha += not has_alpha
        rank = _setting(config, "rank_pattern", "r", module) or layer.rank
        other_rank += layer.kind == "lora" and rank != layer.rank
    leaving_out = "its settings exclude_modules or layers_to_transform"
    if not layers:
        raise ValueError(f"{where}: {leaving_out} leave out all its layers")
    if left_out:
        notes.append(f"{left_out} layers are left out by {leaving_out}")
    if other_rank:
        notes.append(
            f"its setting r is not the rank of the weights of {other_rank} layers, which counts"
        )
    missing = f"alpha of {without_alpha} layers, taken as their rank"
    return Adapter(
        layers,
        format=form_of(weights, Adapter(layers).kinds, settings),
        metadata=metadata,
        keys=Counter(part for (part, _), group in groups.items() for _ in group.tensors),
        ignored=tuple(ignored),
        missing=(missing,) if without_alpha else (),
        stems={place: group.stem for place, group in groups.items()},
        notes=tuple(notes),
    )


def _only_component(weights: Iterable[str], settings: Mapping) -> str | None:
    """The component of the keys that name none."""
    if (component := component_in(settings)) or None not in settings:
        return component
    # settings of one model, whose names say together what some alone do not
    components = {entry.component for key in weights if (entry := parse_key(key))}
    return "transformer" if "transformer" in components else None


def _grouped(
    weights: Mapping[str, Tensor], only: str | None, layers_per_block: int, where: str
) -> tuple[dict[tuple[str, str], _Group], list[str]]:
    """The tensors by component and module, and the keys of no layer that is read here."""
    groups: dict[tuple[str, str], _Group] = {}
    ignored, key_of_adapter, twice = [], {}, None
    for key, value in weights.items():
        entry = parse_key(key, only, layers_per_block)
        is_layer = entry and (
            entry.role != "diff" or (value.dim() > 1 and not entry.module.endswith("n_embedding"))
        )
        if not is_layer:
            ignored.append(key)
            continue
        group = groups.setdefault((entry.component, entry.module), _Group(entry.stem))
        if entry.role in group.tensors:
            twice = twice or (group.stem, entry.stem)
        group.stem, group.tensors[entry.role] = entry.stem, value
        if entry.role not in ("alpha", "magnitude", "vector"):
            group.kind = entry.kind
        if entry.adapter:
            key_of_adapter.setdefault(entry.adapter, key)
    if len(key_of_adapter) > 1:
        (first, key), *_ = key_of_adapter.items()
        names = " and ".join(map(repr, [*key_of_adapter][:3]))
        raise ValueError(
            f"{where} holds {len(key_of_adapter)} adapters, {names}, as in {key:.110}; load one: "
            f"{{k: v for k, v in weights.items() if '.{first}.' in f'{{k}}.'}}"
        )
    if twice:
        raise ValueError(
            f"{where} has a layer twice, as {twice[0]:.100} and as {twice[1]:.100}; leave out one"
        )
    return groups, ignored


def _layer(module: str, group: _Group, config: Mapping, where: str) -> tuple[Layer, bool]:
    """The layer, and whether its alpha is known."""
    kind, tensors = group.kind, dict(group.tensors)
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("magnitude", None)
    if (vector := tensors.pop("vector", None)) is not None:
        magnitude = vector.flatten()
    if lacking := " and ".join(_lacking(kind, tensors)):
        raise ValueError(f"{where} is incomplete: layer {module} lacks {lacking}; fetch it anew")
    rank = _rank(kind, tensors, config, module)
    if kind != "full" and not rank:
        raise ValueError(f"{where}: layer {module} has rank 0, so it holds nothing; fetch it anew")
    if kind == "lora" and "mid" not in tensors and tensors["up"].shape[1] != rank:
        raise ValueError(
            f"{where}: layer {module} has {rank} rows in one half and "
            f"{tensors['up'].shape[1]} columns in the other; both are the rank and must be alike"
        )
    use_dora = config.get("use_dora")
    if kind == "lora" and use_dora is not None and use_dora != (magnitude is not None):
        raise ValueError(
            f"{where}: its setting use_dora is {use_dora}, and layer {module} has "
            f"{'no' if use_dora else 'a'} magnitude; one of them is wrong: fetch it anew"
        )
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(
            f"{where}: the alpha of layer {module} has {alpha.numel()} numbers, not one"
        )
    # LyCORIS gives a LoKr without low-rank halves no scale; PEFT's settings do
    is_whole_lokr = kind == "lokr" and {"w1", "w2"} <= tensors.keys() and not config
    if kind == "full" or is_whole_lokr:
        scaling = 1.0
    elif alpha is not None and float(alpha) != 0:
        scaling = float(alpha) / rank
    else:  # 0 stands for the rank, as in Kohya's and LyCORIS's own readers
        scaling = _scaling_by_settings(config, rank, module)
    start = start_of(config) if kind == "lora" else None
    layer = Layer(kind, tensors, 1.0 if scaling is None else scaling, rank, start=start)
    if magnitude is not None:  # a flat one that is not as long as the outputs is by input
        by_input = magnitude.dim() == 1 and len(magnitude) != matrix_shape(layer)[0]
        layer = replace(layer, magnitude=magnitude.unsqueeze(0) if by_input else magnitude)
    return layer, scaling is not None


def _lacking(kind: str | None, tensors: Mapping[str, Tensor]) -> list[str]:
    if kind != "lokr":
        return [role for role in NEEDS.get(kind, ("up", "down")) if role not in tensors]
    halves = {name: {f"{name}_a", f"{name}_b"} for name in ("w1", "w2")}
    return [
        name for name, pair in halves.items() if name not in tensors and not pair <= tensors.keys()
    ]


def _rank(kind: str, tensors: Mapping[str, Tensor], config: Mapping, module: str) -> int:
    if kind == "full":
        return 0
    roles = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("t2", "w2_b", "w1_b")}[kind]
    low_rank = next((tensors[role] for role in roles if role in tensors), None)
    if low_rank is None:  # a LoKr of whole halves
        return int(_setting(config, "rank_pattern", "r", module) or 1)
    return low_rank.shape[0]


def _scaling_by_settings(config: Mapping, rank: int, module: str) -> float | None:
    name = "lora_alpha" if "lora_alpha" in config else "alpha"
    alpha = _setting(config, "alpha_pattern", name, module)
    if alpha is None:
        return None
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _setting(config: Mapping, pattern: str, plain: str, module: str):
    """PEFT's setting of a layer: by the pattern that fits its name, else that of all layers."""
    for name in (module, module.removeprefix("text_model.")):
        value = pattern_value(config.get(pattern) or {}, name)
        if value is not None:
            return value
    return config.get(plain)
