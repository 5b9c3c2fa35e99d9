"""PEFT's settings of an adapter: those that say what its weights mean, believed, or refused by name."""

import re
from collections.abc import Mapping
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists

from lorabook.lora.formats.keys import COMPONENTS, METADATA_KEY
from lorabook.lora.training_settings import parsed

STARTS = (
    "pissa",
    "olora",
)  # a part that was taken out of the base model, and that can be computed from it again
_TYPES = ("LORA", "LOHA", "LOKR")
_INIT = "init_lora_weights"
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BEYOND = 1e30  # no alpha is
_DEFAULT = 8  # PEFT's, for rank and alpha
# settings that add to ΔW what its two factors do not hold, or give the factors another meaning
_REFUSED = (
    "lora_bias",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "enable_lora",
)
# settings of training or of where the layers are, which the weights themselves show, and notes
_HARMLESS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "target_modules",
    "layers_pattern",
    "lora_dropout",
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "merge_weights",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "ensure_weight_tying",
    "use_effective_conv2d",
    "decompose_both",
    "decompose_factor",
    "init_weights",
    "fan_in_fan_out",
}  # which PEFT drops for Linear and Conv2d layers, the only ones here


def settings_in(metadata: Mapping[str, str]) -> tuple[dict[str | None, dict], tuple[str, ...]]:
    """PEFT's settings in diffusers' metadata.

    Returns: by component, None for all where no component stands before them, as in what `save_lora_adapter` writes; and
        a sentence on what could not be read.
    """
    if METADATA_KEY not in metadata:
        return {}, ()
    told = parsed(metadata[METADATA_KEY], object)
    if not isinstance(told, dict):
        return {}, (
            f"its {METADATA_KEY} holds no settings by name but {metadata[METADATA_KEY]:.40}",
        )
    configs: dict[str | None, dict] = {}
    for key, value in told.items():
        part, dot, name = key.partition(".")
        configs.setdefault(part if dot and part in COMPONENTS else None, {})[
            name if part in COMPONENTS else key
        ] = value
    return configs, ()


def settings_of(
    configs: Mapping[str | None, Mapping] | None, metadata: Mapping[str, str], where: str
) -> tuple[dict[str | None, dict], tuple[str, ...]]:
    """The settings of each component, those given or else those in the metadata, as `checked_settings` believes them."""
    told, said = (configs, ()) if configs else settings_in(metadata)
    kept, notes = {}, list(said)
    for part, config in told.items():
        kept[part], more = checked_settings(config, where)
        notes += more
    return kept, tuple(dict.fromkeys(notes))


def component_in(configs: Mapping[str | None, Mapping]) -> str | None:
    """The component that all keys without one belong to, where the settings tell: by its name, or its model's class."""
    if len(configs) != 1:
        return None
    ((part, config),) = configs.items()
    kind = config.get("auto_mapping")
    kind = str(kind.get("base_model_class")) if part is None and isinstance(kind, dict) else ""
    return part or (
        "transformer" if "Transformer" in kind else "text_encoder" if "Text" in kind else None
    )


def checked_settings(config: Mapping, where: str) -> tuple[dict, list[str]]:
    """The settings of one component that can be believed.

    Args:
        config: PEFT's LoraConfig, LoHaConfig or LoKrConfig as a dictionary.
        where: what to call the adapter in errors.
    Returns: the settings, and a sentence for each that says nothing or that is not known.
    Raises: ValueError for one with which the weights mean something that is not read here.
    """
    _check_refused(config, where)
    kept, notes = dict(config), []
    for name, (fits, wanted) in _WANTED.items():
        value = config.get(name)
        if (
            name in config
            and not (value is None and name not in ("r", "lora_alpha", "alpha"))
            and not fits(value)
        ):
            notes.append(
                f"its setting {name} is {value!r:.40}, which is no {wanted} and was passed over"
            )
            del kept[name]
    alpha = next((name for name in ("lora_alpha", "alpha") if name in config), None)
    if alpha is None and "r" in kept:
        kept["lora_alpha"] = _DEFAULT
        notes.append(f"its settings do not tell alpha, which PEFT then takes as {_DEFAULT}")
    unknown = [
        name
        for name, value in config.items()
        if value not in (None, "", [], {}) and name not in _KNOWN
    ]
    if unknown:
        notes.append(
            f"settings that are not known here and were passed over: {', '.join(map(str, sorted(unknown))):.200}"
        )
    return kept, notes


def start_of(config: Mapping | None) -> str | None:
    """What was taken out of the base model before the training: "pissa", "olora" or None."""
    value = (config or {}).get(_INIT)
    return value.lower() if isinstance(value, str) and value.lower() in STARTS else None


def is_left_out(config: Mapping | None, module: str) -> bool:
    """Whether PEFT leaves the weights of a layer out, by `exclude_modules` and `layers_to_transform`."""
    config = config or {}
    if not (config.get("exclude_modules") or config.get("layers_to_transform") is not None):
        return False
    targets = config.get("target_modules")
    told = SimpleNamespace(
        target_modules=".*" if targets in (None, "all-linear") else targets,
        target_parameters=None,
        **{
            key: config.get(key)
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
        },
    )
    return not any(
        check_target_module_exists(told, name)
        for name in (module, module.removeprefix("text_model."))
    )


def _check_refused(config: Mapping, where: str) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA")).upper()
    if kind not in _TYPES:
        raise ValueError(
            f"{where} is a {kind:.40} of PEFT's, by its setting peft_type; what is read here is "
            f"{', '.join(_TYPES)}; load it with PEFT's own PeftModel.from_pretrained"
        )
    init = config.get(_INIT)
    name = init.lower() if isinstance(init, str) else init
    if name not in (*_HARMLESS_INITS, *STARTS):
        raise ValueError(
            f"{where} belongs to a base model that its setting {_INIT}={init!r:.40} changed in a way that "
            "cannot be computed here; where it was trained, PEFT makes an ordinary LoRA of it: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for setting in _REFUSED:
        value = config.get(setting)
        if value and not (setting == "bias" and value == "none"):
            raise ValueError(
                f"{where}: its setting {setting}={value!r:.60} changes more than the low-rank weights say, "
                "which is not read here; load it with PEFT's own PeftModel.from_pretrained"
            )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _BEYOND


def _is_rank(value) -> bool:
    return _is_number(value) and value == int(value) and value > 0


def _are_patterns(value, fits) -> bool:
    try:
        return isinstance(value, dict) and all(
            re.compile(key) and fits(number) for key, number in value.items()
        )
    except (re.error, RecursionError, OverflowError):
        return False


def _are_names(value) -> bool:
    return (
        isinstance(value, str)
        or isinstance(value, (list, tuple, set))
        and all(isinstance(name, str) for name in value)
    )


def _are_indices(value) -> bool:
    return (
        isinstance(value, int)
        or isinstance(value, list)
        and all(isinstance(index, int) for index in value)
    )


# what the settings that are used here must be
_WANTED = {
    "r": (_is_rank, "rank"),
    "lora_alpha": (_is_number, "number"),
    "alpha": (_is_number, "number"),
    "use_rslora": (lambda value: isinstance(value, bool), "yes or no"),
    "use_dora": (lambda value: isinstance(value, bool), "yes or no"),
    "rank_pattern": (lambda value: _are_patterns(value, _is_rank), "table of ranks by layer"),
    "alpha_pattern": (lambda value: _are_patterns(value, _is_number), "table of numbers by layer"),
    "target_modules": (_are_names, "list of names"),
    "exclude_modules": (_are_names, "list of names"),
    "layers_pattern": (_are_names, "list of names"),
    "layers_to_transform": (_are_indices, "list of numbers"),
}
_KNOWN = {_INIT, *_REFUSED, *_HARMLESS, *_WANTED}
