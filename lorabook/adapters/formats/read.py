"""Weights by whatever keys, read into the neutral form."""
import json
from collections import Counter
from collections.abc import Mapping

from peft.utils.other import get_pattern_key
from torch import Tensor

from lorabook.adapters.adapter import NEEDS, Adapter, Layer
from lorabook.adapters.files import METADATA_KEY
from lorabook.adapters.formats.keys import PREFIXES, form_of, take_apart


def parse(weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *,
          configs: Mapping[str, Mapping] | None = None, layers_per_block: int = 2, where: str = "the adapter") -> Adapter:
    """An adapter from its weights.

    Args:
        weights: by the keys of diffusers (now and before PEFT), PEFT, Kohya, A1111 or LyCORIS.
        metadata: the file's.
        configs: PEFT's config by component, None where the metadata holds them or the weights say all.
        layers_per_block: of the UNet, for names in Stability's order; 2 in Stable Diffusion and SDXL.
        where: what to call it in errors.
    Returns: the Adapter, without base model and trigger words.
    Raises: ValueError where no weights of layers are found, or a layer lacks some.
    """
    metadata = dict(metadata or {})
    configs = dict(configs or _configs(metadata))
    only = next(iter(configs)) if len(configs) == 1 else None
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    kinds: dict[tuple[str, str], str] = {}
    ignored, counts = [], Counter()
    for key, value in weights.items():
        apart = take_apart(key, only, layers_per_block)
        if apart is None:
            ignored.append(key)
            continue
        counts[apart.component] += 1
        place = apart.component, apart.module
        found.setdefault(place, {})[apart.role] = value
        if apart.role not in ("alpha", "magnitude", "vector"):
            kinds[place] = apart.kind
    if not kinds:
        raise ValueError(f"{where} is not a LoRA: none of its {len(weights)} keys names a low-rank weight"
                         + (f", for example {ignored[0]:.100}" if ignored else ""))
    # whole differences come with those of biases, which are harmless where they are zero
    if strange := [key for key in ignored if key.startswith(PREFIXES) and weights[key].any()]:
        raise ValueError(f"{where} has {len(strange)} weights of a kind that is not read here, for example "
                         f"{strange[0]:.100}; what is read is LoRA, LoCon, LoHa, LoKr, DoRA and whole differences")
    layers: dict[str, dict[str, Layer]] = {}
    assumed = 0
    for (part, module), tensors in found.items():
        layer, known = _layer(module, kinds.get((part, module)), tensors, configs.get(part), where)
        layers.setdefault(part, {})[module] = layer
        assumed += not known
    adapter = Adapter(layers, metadata=metadata, ignored=tuple(ignored), keys=dict(counts),
                      missing=(f"alpha of {assumed} layers, taken as their rank",) if assumed else ())
    return Adapter(**vars(adapter) | {"format": form_of(weights, adapter.kinds, configs)})


def _configs(metadata: Mapping[str, str]) -> dict[str, dict]:
    """PEFT's config by component, from diffusers' metadata."""
    configs: dict[str, dict] = {}
    try:
        flat = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return configs


def _layer(module: str, kind: str | None, tensors: dict, config: Mapping | None, where: str) -> tuple[Layer, bool]:
    """The layer, and whether its alpha was known."""
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("magnitude", None)
    vector = tensors.pop("vector", None)
    lacks = [role for role in NEEDS[kind] if role not in tensors] if kind else ["up", "down"]
    if kind == "lokr":
        lacks = [f"w{i}" for i in (1, 2) if f"w{i}" not in tensors and not {f"w{i}_a", f"w{i}_b"} <= tensors.keys()]
    if lacks:
        raise ValueError(f"{where} is incomplete: layer {module} lacks {' and '.join(lacks)}; fetch it anew")
    rank = _rank(kind, tensors, config, module)
    if kind != "full" and not rank:
        raise ValueError(f"{where}: layer {module} has rank 0, so it holds nothing; the rank must be 1 or more")
    if kind == "lora" and tensors["up"].shape[1] != tensors["down"].shape[0] and "mid" not in tensors:
        raise ValueError(f"{where}: layer {module} has {tensors['down'].shape[0]} rows in one half and "
                         f"{tensors['up'].shape[1]} columns in the other; both are the rank and must be alike")
    scaling, known = _scaling(kind, tensors, alpha, rank, config, module)
    return Layer(kind, tensors, scaling, rank, magnitude if vector is None else vector.flatten()), known


def _rank(kind: str, tensors: Mapping[str, Tensor], config: Mapping | None, module: str) -> int:
    if kind == "full":
        return 0
    if kind == "lokr":
        for role, axis in (("t2", 0), ("w2_b", 0), ("w1_b", 0)):
            if role in tensors:
                return tensors[role].shape[axis]
        return int(_setting(config, "rank_pattern", "r", module) or 1)
    return tensors["w1_b" if kind == "loha" else "down"].shape[0]


def _scaling(kind, tensors, alpha, rank, config, module) -> tuple[float, bool]:
    """alpha / rank, and whether alpha was known."""
    # LyCORIS gives a LoKr without low-rank halves no scale; PEFT's config does
    if kind == "full" or (kind == "lokr" and {"w1", "w2"} <= tensors.keys() and not config):
        return 1.0, True
    if alpha is not None and float(alpha) != 0:  # 0 stands for the rank, as in Kohya's and LyCORIS's own readers
        return float(alpha) / rank, True
    given = _setting(config, "alpha_pattern", "lora_alpha" if "lora_alpha" in (config or {}) else "alpha", module)
    if not given:
        return 1.0, False
    return float(given) / (rank**0.5 if config.get("use_rslora") else rank), True


def _setting(config: Mapping | None, pattern: str, plain: str, module: str):
    if not config:
        return None
    patterns = config.get(pattern) or {}
    for name in (module, module.removeprefix("text_model.")):
        key = get_pattern_key(patterns, name)
        if key in patterns:
            return patterns[key]
    return config.get(plain)
