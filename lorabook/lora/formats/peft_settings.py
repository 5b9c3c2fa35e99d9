"""PEFT's settings of an adapter: those that say what its weights mean, or refused by name."""

import re
from collections.abc import Mapping

from lorabook.checks import is_number
from lorabook.lora.formats.keys import COMPONENTS, METADATA_KEY
from lorabook.lora.metadata import parse_json
from lorabook.upstream import is_targeted

_TYPES = ("LORA", "LOHA", "LOKR")
_INIT = "init_lora_weights"
# With these, training began with a part of the base model's weight, which can be computed again.
_STARTS = ("pissa", "olora")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_DEFAULT_ALPHA = 8  # PEFT's
# Settings that add to ΔW what its two factors do not hold, or give the factors another meaning.
_REFUSED = (
    "lora_bias bias modules_to_save trainable_token_indices target_parameters layer_replication "
    "alora_invocation_tokens arrow_config use_qalora use_bdlora kasa_config monteclora_config "
    "megatron_config enable_lora"
)
# Settings of the training, or that the weights themselves show, and notes. PEFT drops
# fan_in_fan_out for Linear and Conv2d layers, the only ones here.
_HARMLESS = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "runtime_config target_modules layers_pattern lora_dropout rank_dropout module_dropout "
    "rank_dropout_scale merge_weights megatron_core qalora_group_size loftq_config eva_config "
    "corda_config lora_ga_config velora_config ensure_weight_tying use_effective_conv2d "
    "decompose_both decompose_factor init_weights fan_in_fan_out"
)


def settings_of(
    configs: Mapping[str | None, Mapping] | None, metadata: Mapping[str, str], where: str
) -> tuple[dict[str | None, dict], tuple[str, ...]]:
    """The settings by component that can be relied on, and a sentence for each that cannot.

    Where there are no `configs`, diffusers' metadata are to say them. ValueError for a setting with
    which the weights mean something that is not read here.
    """
    notes: list[str] = []
    if not configs and METADATA_KEY in metadata:
        flat = parse_json(metadata[METADATA_KEY], object)
        configs = _by_component(flat) if isinstance(flat, dict) else {}
        if not configs:
            notes.append(f"its {METADATA_KEY} holds no settings by name but {flat!r:.40}")
    settings = {}
    for component, config in (configs or {}).items():
        _check_refused(config, where)
        settings[component], more = _usable(config)
        notes += more
    return settings, tuple(dict.fromkeys(notes))


def component_in(settings: Mapping[str | None, Mapping]) -> str | None:
    """The component that all keys without one belong to, where the settings say it."""
    if len(settings) != 1:
        return None
    ((component, config),) = settings.items()
    mapping = config.get("auto_mapping")
    if component or not isinstance(mapping, dict):
        return component
    model = str(mapping.get("base_model_class"))
    if "Transformer" in model:
        return "transformer"
    return "text_encoder" if "Text" in model else None


def start_of(config: Mapping | None) -> str | None:
    """What was taken out of the base model before the training: "pissa", "olora" or None."""
    value = (config or {}).get(_INIT)
    return value.lower() if isinstance(value, str) and value.lower() in _STARTS else None


def is_left_out(config: Mapping | None, module: str) -> bool:
    """Whether PEFT leaves a layer's weights out, by exclude_modules or layers_to_transform."""
    config = config or {}
    if not config.get("exclude_modules") and config.get("layers_to_transform") is None:
        return False
    names = (module, module.removeprefix("text_model."))
    return not any(is_targeted(config, name) for name in names)


def _by_component(flat: Mapping) -> dict[str | None, dict]:
    """The settings by component; None where diffusers' `save_lora_adapter` wrote none before."""
    configs: dict[str | None, dict] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        if component not in COMPONENTS:
            component, name = None, key
        configs.setdefault(component, {})[name] = value
    return configs


def _check_refused(config: Mapping, where: str) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA")).upper()
    if kind not in _TYPES:
        raise ValueError(
            f"{where} is a {kind:.40} of PEFT's, by its setting peft_type; what is read is "
            f"{', '.join(_TYPES)}; load it with PEFT's own PeftModel.from_pretrained"
        )
    init = config.get(_INIT)
    if (init.lower() if isinstance(init, str) else init) not in (*_HARMLESS_INITS, *_STARTS):
        raise ValueError(
            f"{where} belongs to a base model that its setting {_INIT}={init!r:.40} changed; where "
            "it was trained, PEFT makes an ordinary LoRA of it: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for setting in _REFUSED.split():
        value = config.get(setting)
        if value and (setting, value) != ("bias", "none"):
            raise ValueError(
                f"{where}: its setting {setting}={value!r:.60} changes more than the low-rank "
                "weights say; load it with PEFT's own PeftModel.from_pretrained"
            )


def _usable(config: Mapping) -> tuple[dict, list[str]]:
    """The settings of the right type, and a sentence for each of the wrong type or unknown."""
    usable, notes = dict(config), []
    for name, kind in _USED.items():
        value = config.get(name)
        is_unset = value is None and name not in ("r", "lora_alpha", "alpha")
        if name in config and not is_unset and not _is_valid(value, kind):
            notes.append(
                f"its setting {name} is {value!r:.40}, which is no {kind} and was passed over"
            )
            del usable[name]
    if "r" in usable and not {"lora_alpha", "alpha"} & config.keys():
        usable["lora_alpha"] = _DEFAULT_ALPHA
        notes.append(f"its settings do not tell alpha, which PEFT then takes as {_DEFAULT_ALPHA}")
    known = {_INIT, *_REFUSED.split(), *_HARMLESS.split(), *_USED}
    is_set = {name for name, value in config.items() if value not in (None, "", [], {})}
    if unknown := ", ".join(sorted(map(str, is_set - known))):
        notes.append(f"settings that are not known here and were passed over: {unknown:.200}")
    return usable, notes


# The settings that are used here, and what they must be.
_USED = {
    "r": "rank",
    "lora_alpha": "number",
    "alpha": "number",
    "use_rslora": "yes or no",
    "use_dora": "yes or no",
    "rank_pattern": "table of ranks by layer",
    "alpha_pattern": "table of numbers by layer",
    "target_modules": "list of names",
    "exclude_modules": "list of names",
    "layers_pattern": "list of names",
    "layers_to_transform": "list of numbers",
}


def _is_valid(value: object, kind: str) -> bool:
    if kind == "yes or no":
        return isinstance(value, bool)
    if kind in ("rank", "number"):
        is_alpha = is_number(value) and abs(value) < 1e30  # which none is beyond
        return is_alpha and (kind == "number" or value == int(value) > 0)
    if kind.startswith("table"):
        kind = "rank" if "ranks" in kind else "number"
        try:
            return all(re.compile(key) and _is_valid(entry, kind) for key, entry in value.items())
        except (AttributeError, re.error, RecursionError, OverflowError):
            return False
    entries = value if isinstance(value, (list, tuple, set)) else [value]
    return all(isinstance(entry, str if kind == "list of names" else int) for entry in entries)
