"""Weights by whatever keys, read into the neutral form."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from peft.utils.other import get_pattern_key
from torch import Tensor

from lorabook.lora.adapter import NEEDS, Adapter, Layer
from lorabook.lora.formats.keys import form_of, names_a_layer, take_apart
from lorabook.lora.formats.other_files import other_kind
from lorabook.lora.formats.peft_settings import component_in, is_left_out, settings_of, start_of
from lorabook.lora.shapes import matrix_shape


def parse(
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    configs: Mapping[str, Mapping] | None = None,
    layers_per_block: int = 2,
    where: str = "the adapter",
) -> Adapter:
    """An adapter from its weights.

    Args:
        weights: by the keys of diffusers (now and before PEFT), PEFT, Kohya, A1111 or LyCORIS.
        metadata: the file's.
        configs: what PEFT's adapter_config.json holds, by component or None for all; None where there is none.
        layers_per_block: of the UNet, for names in Stability's order; 2 in Stable Diffusion and SDXL.
        where: what to call it in errors.
    Returns: the Adapter, without base model and trigger words.
    Raises: ValueError where no weights of layers are found, or a layer lacks some.
    """
    metadata = dict(metadata or {})
    settings, notes = settings_of(configs, metadata, where)
    only = component_in(settings)
    if (
        None in settings and not only
    ):  # settings of one model, whose names say together what some alone do not
        guesses = {apart.component for key in weights if (apart := take_apart(key))}
        only = "transformer" if "transformer" in guesses else None
    found = _sorted(weights, only, layers_per_block)
    is_other = not found.kinds or any(
        key.startswith(("image_proj.", "ip_adapter.")) for key in weights
    )
    if is_other and (other := other_kind(weights, where)):
        raise ValueError(other)
    notes += passed_over(weights, found.ignored, where)
    if not found.kinds:
        raise ValueError(
            f"{where} is not a LoRA: none of its {len(weights)} keys names a low-rank weight"
            + (f", for example {found.ignored[0]:.100}" if found.ignored else "")
        )
    _check_one(found, where)
    layers: dict[str, dict[str, Layer]] = {}
    assumed = left = unlike = 0
    for (part, module), tensors in found.tensors.items():
        config = settings.get(part, settings.get(None))
        if configs and is_left_out(
            config, module
        ):  # diffusers, whose metadata say the same, goes by the weights
            found.ignored.append(f"{part}.{module}")
            left += 1
            continue
        layer, known = _layer(module, found.kinds.get((part, module)), tensors, config, where)
        layers.setdefault(part, {})[module] = layer
        assumed += not known
        unlike += (
            layer.kind == "lora"
            and (_setting(config, "rank_pattern", "r", module) or layer.rank) != layer.rank
        )
    if not layers:
        raise ValueError(
            f"{where}: its settings exclude_modules and layers_to_transform leave out all its layers"
        )
    notes += (
        (f"{left} layers are left out by its settings exclude_modules or layers_to_transform",)
        if left
        else ()
    )
    notes += (
        (f"its setting r is not the rank of the weights of {unlike} layers, which counts",)
        if unlike
        else ()
    )
    adapter = Adapter(
        layers,
        metadata=metadata,
        ignored=tuple(found.ignored),
        notes=notes,
        keys=dict(found.counts),
        stems=found.stems,
        missing=(f"alpha of {assumed} layers, taken as their rank",) if assumed else (),
    )
    return Adapter(**vars(adapter) | {"format": form_of(weights, adapter.kinds, settings)})


class _Found:
    """A file's tensors by layer and role, and all that its keys say."""

    def __init__(self):
        self.tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.kinds: dict[tuple[str, str], str] = {}
        self.stems: dict[tuple[str, str], str] = {}
        self.names: dict[str, str] = {}  # of adapters, each with a key
        self.counts: Counter = Counter()
        self.ignored: list[str] = []
        self.twice: list[tuple[str, str]] = []


def _sorted(weights: Mapping[str, Tensor], only: str | None, layers_per_block: int) -> _Found:
    found = _Found()
    for key, value in weights.items():
        apart = take_apart(key, only, layers_per_block)
        if apart is None or (
            apart.role == "diff" and (value.dim() < 2 or apart.module.endswith("n_embedding"))
        ):
            found.ignored.append(key)
            continue
        place = apart.component, apart.module
        found.counts[apart.component] += 1
        if apart.role in found.tensors.setdefault(place, {}):
            found.twice.append((found.stems[place], apart.stem))
        found.tensors[place][apart.role] = value
        found.stems[place] = apart.stem
        if apart.adapter:
            found.names.setdefault(apart.adapter, key)
        if apart.role not in ("alpha", "magnitude", "vector"):
            found.kinds[place] = apart.kind
    return found


def _check_one(found: _Found, where: str) -> None:
    """Raise ValueError where a file holds more than one adapter, or a layer twice."""
    if len(found.names) > 1:
        (first, key), *_ = found.names.items()
        raise ValueError(
            f"{where} holds {len(found.names)} adapters, {' and '.join(map(repr, [*found.names][:3]))}, as in "
            f"{key:.110}; load one: {{k: v for k, v in weights.items() if '.{first}.' in f'{{k}}.'}}"
        )
    if found.twice:
        raise ValueError(
            f"{where} has a layer twice, as {found.twice[0][0]:.100} and as {found.twice[0][1]:.100}; give its "
            "weights without one of the two"
        )


def _layer(
    module: str, kind: str | None, tensors: dict, config: Mapping | None, where: str
) -> tuple[Layer, bool]:
    """The layer, and whether its alpha was known."""
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("magnitude", None)
    vector = tensors.pop("vector", None)
    lacks = [role for role in NEEDS[kind] if role not in tensors] if kind else ["up", "down"]
    if kind == "lokr":
        lacks = [
            f"w{i}"
            for i in (1, 2)
            if f"w{i}" not in tensors and not {f"w{i}_a", f"w{i}_b"} <= tensors.keys()
        ]
    if lacks:
        raise ValueError(
            f"{where} is incomplete: layer {module} lacks {' and '.join(lacks)}; fetch it anew"
        )
    rank = _rank(kind, tensors, config, module)
    if kind != "full" and not rank:
        raise ValueError(
            f"{where}: layer {module} has rank 0, so it holds nothing; the rank must be 1 or more"
        )
    if (
        kind == "lora"
        and tensors["up"].shape[1] != tensors["down"].shape[0]
        and "mid" not in tensors
    ):
        raise ValueError(
            f"{where}: layer {module} has {tensors['down'].shape[0]} rows in one half and "
            f"{tensors['up'].shape[1]} columns in the other; both are the rank and must be alike"
        )
    scaling, known = _scaling(kind, tensors, alpha, rank, config, module)
    layer = Layer(kind, tensors, scaling, rank, start=start_of(config) if kind == "lora" else None)
    magnitude = magnitude if vector is None else vector.flatten()
    told = (config or {}).get("use_dora")
    if kind == "lora" and told is not None and told != (magnitude is not None):
        raise ValueError(
            f"{where}: its setting use_dora is {told}, and layer {module} has "
            f"{'no' if told else 'a'} magnitude; one of them is wrong: fetch it anew"
        )
    return replace(layer, magnitude=_magnitude(magnitude, matrix_shape(layer)[0])), known


def _magnitude(value: Tensor | None, out: int) -> Tensor | None:
    """DoRA's magnitude: by output (out, …), by input (1, in, …); a flat one of another length than `out` is by input."""
    return (
        value.unsqueeze(0)
        if value is not None and value.dim() == 1 and len(value) != out
        else value
    )


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
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"the alpha of layer {module} has {alpha.numel()} numbers; it must be one")
    if (
        alpha is not None and float(alpha) != 0
    ):  # 0 stands for the rank, as in Kohya's and LyCORIS's own readers
        return float(alpha) / rank, True
    given = _setting(
        config, "alpha_pattern", "lora_alpha" if "lora_alpha" in (config or {}) else "alpha", module
    )
    if given is None:
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


READ = "LoRA, LoCon, LoHa, LoKr, DoRA and whole differences"
_KINDS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.(w_norm|b_norm)$", "trained norms"),
        (r"\.diff_b$", "differences of biases"),
        (r"\.diff$", "differences of norms and embeddings"),
        (r"\.set_weight$", "replaced weights"),
        (r"\.b?oft_\w+(\.[\w-]+)*$", "OFT"),
        (r"\.(on_input|ia3_l)\b", "IA³"),
        (r"\.[ab][12]\.weight$", "GLoRA"),
        (r"\.lora_embedding_[AB]\b", "LoRA of embeddings"),
        (r"\.bias$|\.lora_bias\b", "biases"),
        (r"\.vera_\w+|\.hra_u\b|\.c3a_\w+|\.lora_XS\b", "a rarer kind of PEFT's"),
    )
]
_EMBEDDING = re.compile(
    r"bundle_emb\.(?P<name>.+?)\.(?P<part>(?:clip_[glh]|t5\w*)(?:_out)?|string_to_param\.[^.]+"
    r"|emb_params|[^.]+)$"
)


def passed_over(
    weights: Mapping[str, Tensor], ignored: Iterable[str], where: str
) -> tuple[str, ...]:
    """Why keys that are not read change nothing, a sentence each.

    Args:
        weights: of the whole file.
        ignored: those keys of it that are no weights of a layer that could be read.
        where: what to call the file in errors.
    Raises: ValueError where one of them would change the picture.
    """
    ignored = [key for key in ignored if not _EMBEDDING.match(key)]
    ours = [key for key in ignored if names_a_layer(key)]
    ia3 = any(key.endswith(".on_input") for key in ours)
    if strange := [key for key in ours if _changes_something(key, weights[key])]:
        examples = {_kind(key, ia3): key for key in reversed(strange)}
        named = " and ".join(
            f"{key:.100} ({kind})" if kind else f"{key:.100}"
            for kind, key in list(examples.items())[:2]
        )
        raise ValueError(
            f"{where} has {len(strange)} weights of a kind that is not read here, for example {named}; what is "
            f"read is {READ}"
        )
    others = [key for key in ignored if not names_a_layer(key)]
    kinds = ", ".join(dict.fromkeys(filter(None, (_kind(key, ia3) for key in ours))))
    return (
        *(
            f"{len(ours)} weights are zero, so that they change nothing ({kinds or 'of no kind that is read'})"
            for _ in ours[:1]
        ),
        *(f"{len(others)} keys name no layer, for example {key:.100}" for key in others[:1]),
    )


def embedding_notes(ignored: Iterable[str], path: Path | None) -> tuple[str, ...]:
    """What to say of the textual inversions in an adapter's file, with the calls that load them; nothing where none are.

    Args:
        ignored: the file's keys that are of no layer.
        path: the file; None for weights in memory.
    Source: the keys of lycoris/tools in KohakuBlueleaf/LyCORIS, as OneTrainer and A1111's Lora extension have them.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(ignored, reverse=True):  # clip_l before clip_g
        if told := _EMBEDDING.match(key):
            found.setdefault(told["name"], []).append((told["part"], key))
    if not found:
        return ()
    calls = [
        f"pipe.load_textual_inversion(e[{key!r}], token={name!r}"
        + (
            ", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)"
            if part == "clip_g"
            else ")"
        )
        for name, parts in found.items()
        for part, key in parts
        if not part.endswith("_out") and part[:2] != "t5"
    ]
    beyond = [
        key
        for parts in found.values()
        for part, key in parts
        if part.endswith("_out") or part[:2] == "t5"
    ]
    read = "from safetensors.torch import load_file; "
    read = "e = the adapter's weights" if path is None else f"{read}e = load_file({str(path)!r})"
    return (
        f"the file holds an embedding (textual inversion) for {', '.join(map(repr, sorted(found)))}, which prompts need "
        f"and which is not loaded; load it with {read}; {'; '.join(calls)}"
        + f" ({', '.join(beyond)}: for OneTrainer alone)"
        * bool(beyond),
    )


def _kind(key: str, ia3: bool) -> str:
    found = next((name for pattern, name in _KINDS if pattern.search(key)), "")
    return found or ("IA³" if ia3 and key.endswith(".weight") else "")


def _changes_something(key: str, value: Tensor) -> bool:
    if key.endswith(".on_input"):  # says which side IA³'s weight is for
        return False
    return key.endswith(".set_weight") or bool(value.float().any())
