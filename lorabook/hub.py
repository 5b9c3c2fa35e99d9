"""Share an adapter on the Hugging Face Hub, with a model card from what its file says."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import get_session, logging, validate_repo_id
from PIL import Image

from lorabook.lora.formats.keys import METADATA_KEY, WEIGHT_NAME
from lorabook.lora.metadata import outgoing, outgoing_command, outgoing_file, parse_json
from lorabook.lora.source import find_adapter, read_adapter
from lorabook.machine.environment import secret
from lorabook.worlds import bundled

GRID_NAME = "images/grid.png"
# To connect, read, write and get a connection; huggingface_hub itself would wait forever.
SECONDS = (10, 60, 60, 60)
_REMEDY = (
    "set HF_TOKEN, make a Colab or Kaggle secret of that name, or run `hf auth login`, "
    "with a token that has «write» permission"
)
_TAGS = ["text-to-image", "diffusers", "lora", "diffusers-training"]
_CARD = Path(__file__).with_name("model_card.md")


def find_token(token: str | None = None) -> str | None:
    """The token for the Hub: this one, or HF_TOKEN's, `hf auth login`'s, Colab's or Kaggle's."""
    return (token or "").strip() or get_token() or secret("HF_TOKEN")[0]


def open_repository(repo_id: str, token: str | None = None, *, private: bool = False) -> str:
    """Create a model repository on the Hub, or find it; returns its full id, "owner/name".

    ValueError as `client`, and for a token that may not write; ConnectionError without a Hub.
    """
    api = client(repo_id, token)
    with _errors_in_a_sentence(repo_id, api.token):
        full_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        # what a commit asks first: refuses a token that may only read before hours of training
        api.preupload_lfs_files(full_id, [CommitOperationAdd("README.md", b"")])
    return full_id


def push_adapter(
    source,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    licence: str | None = None,
    prompts: Sequence[str] = (),
) -> str:
    """Put an adapter on the Hub, in one commit with a model card and its pictures.

    Args:
        source: A TrainingRun, a folder, an adapter file or a bundled name. Beside the adapter only
            the sample grid and the last pictures in the folder's `validation/` are sent.
        repo_id: "name" or "owner/name".
        token: The Hub's; None is HF_TOKEN's, `hf auth login`'s, Colab's or Kaggle's.
        private: Whether a new repository is private; False leaves it to the owner's settings.
        licence: By the Hub's name for it ("mit", "creativeml-openrail-m" …).
        prompts: Examples for the card.

    Returns:
        The repository's URL.

    Raises:
        FileNotFoundError: If there is no such adapter.
        ValueError: If it is damaged or holds the token, for a malformed id, and for a token that is
            missing or refused.
        ConnectionError: If the Hub cannot be reached. What is on this machine stays as it is.
    """
    path = find_adapter(source)
    files = {WEIGHT_NAME: outgoing_file(path)}
    prompt = parse_json(read_adapter(path)[1].get("training")).get("validation_prompt") or ""
    images = _images(source, path, prompt)
    try:
        api = client(repo_id, token)
        repo_id = open_repository(repo_id, api.token, private=private)
        card = model_card(
            path,
            repo_id,
            licence=licence,
            prompts=prompts,
            command=getattr(source, "command", None),
            pictures={name: "" if name == GRID_NAME else prompt for name in images},
        )
        files |= images | {"README.md": card.encode()}
        # the file as it lies here, too: a user would give it on as it is
        for name, content in [*files.items(), (path.name, path.read_bytes())]:
            if api.token.encode() in content:
                raise ValueError(
                    f"{repo_id}: nothing was sent, as {name} would hold the token; "
                    "train without it there"
                )
        # An open file goes over plain HTTP; a path or bytes by Xet, a second service that mirrors
        # and firewalls may lack. Two threads would read equal files from one open file.
        additions = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
        with _errors_in_a_sentence(repo_id, api.token):
            api.create_commit(
                repo_id, additions, commit_message="Upload LoRA adapter", num_threads=1
            )
    except (ValueError, ConnectionError) as error:
        raise type(error)(f"{str(error)[:280]}; the adapter is still in {path}"[:400]) from None
    return f"{api.endpoint}/{repo_id}"


def client(repo_id: str, token: str | None = None) -> HfApi:
    """The Hub's client for a repository; ValueError for a malformed id, or without a token."""
    try:
        validate_repo_id(repo_id or "")
    except ValueError:
        raise ValueError(
            f"{str(repo_id)[:100]!r} cannot be a repository's id; give name or owner/name, of "
            "letters, digits, - _ and ., at most 96 in all"
        ) from None
    token = find_token(token)
    if not token:
        reason = secret("HF_TOKEN")[1] or _REMEDY
        raise ValueError(f"{repo_id}: there is no token for the Hub; {reason}")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(
            f"{repo_id}: the token for the Hub has blanks or letters that no token has; "
            "copy it anew"
        )
    return HfApi(token=token)


def model_card(
    path: Path,
    repo_id: str,
    *,
    licence: str | None = None,
    prompts: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
    command: str | None = None,
) -> str:
    """The README.md of an adapter's repository, from what the adapter file says.

    Args:
        pictures: Prompts by the pictures' names in the repository.
        command: The command line that trained it.

    Returns:
        YAML front matter and Markdown, without tokens and without this machine's folders.
    """
    weights, metadata = read_adapter(path)
    metadata = outgoing(metadata)
    pictures = pictures or {}
    words = parse_json(metadata.get("trigger_words"), list)
    base = metadata.get("base_model") or "its base model"
    on_hub = bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)) and not Path(base).exists()
    model = base if on_hub else f"path/to/{Path(base).name}"
    examples = [{"text": text, "output": {"url": url}} for url, text in pictures.items() if text]
    examples += [{"text": prompt} for prompt in prompts if prompt not in pictures.values()]
    is_large = any(
        "text_encoder_2." in key or ("attn2.to_k" in key and 2048 in value.shape)
        for key, value in weights.items()
    )
    family = "stable-diffusion-xl" if is_large else "stable-diffusion"
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        inference=True,
        widget=examples or None,
        instance_prompt=metadata.get("instance_prompt") or next(iter(words), None),
        tags=[*_TAGS, family, "template:sd-lora"],
    )
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else Path(base).name
    prompt = examples[0]["text"] if examples else next(iter(words), "a prompt")
    card = ModelCard.from_template(
        data,
        template_path=_CARD,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=f"{link}, which comes with lorabook" if bundled(base) else link,
        grid=GRID_NAME if GRID_NAME in pictures else "",
        has_gallery=any(pictures.values()),
        words=words,
        model=model,
        name=base if bundled(base) else model,
        prompt=json.dumps(prompt, ensure_ascii=False),
        settings=_settings(metadata),
        command=outgoing_command(command) if command else "",
    )
    return f"{card}\n"


def _settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Ranks, alphas and the training settings, as cells of a Markdown table."""
    config, settings = parse_json(metadata.get(METADATA_KEY)), {}
    for name, label in (("r", "rank"), ("lora_alpha", "alpha")):
        for key in [key for key in config if key.endswith(f".{name}")]:
            component = key.removesuffix(f".{name}")
            pattern = config.get(f"{component}.{label}_pattern") or {}
            values = sorted({config[key], *pattern.values()})
            settings[f"{label}, {component}"] = ", ".join(map(str, values))
    settings |= parse_json(metadata.get("training"))
    return {
        key: " ".join(str(value).split()).replace("|", r"\|") for key, value in settings.items()
    }


@contextmanager
def _errors_in_a_sentence(repo_id: str, token: str) -> Iterator[None]:
    """Time limits for the Hub's answers; a failure in one sentence that does not hold the token."""
    session, verbosity = get_session(), logging.get_verbosity()
    timeout, session.timeout = session.timeout, SECONDS
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), 0)
        message = str(getattr(error, "server_message", None) or error).replace(token, "…")
        what = f"answered {status}" if status else "cannot be reached"
        what = f"{what}: {' '.join(message.split())[:120]}"
        if status in (401, 403):
            what = f"refused the token ({status}); {_REMEDY}"
        is_refusal = 400 <= status < 500 and status not in (408, 429)
        kind = ValueError if is_refusal else ConnectionError
        # without its cause, which may quote a request with its token
        raise kind(f"{repo_id}: the Hub {what}") from None
    finally:
        session.timeout = timeout
        logging.set_verbosity(verbosity)


def _images(source, path: Path, prompt: str) -> dict[str, bytes]:
    """The sample grid and the last validation pictures, by name in the repository."""
    images: dict[str, bytes] = {}
    # beside a single file may lie anything
    has_folder = hasattr(source, "adapter") or Path(source).expanduser().is_dir()
    if grid := getattr(source, "grid", None):
        images[GRID_NAME] = grid._repr_png_()
    elif has_folder and (path.parent / "grid.png").is_file():
        images[GRID_NAME] = _bare(path.parent / "grid.png")
    if has_folder and prompt:
        validation = sorted((path.parent / "validation").glob("step-*_seed-*.png"))
        step = validation[-1].name.split("_")[0] if validation else ""
        last = [p for p in validation if p.name.startswith(f"{step}_")]
        images |= {f"images/{p.name}": _bare(p) for p in last[:4]}
    return images


def _bare(path: Path) -> bytes:
    """A picture's pixels alone; the texts in a saved grid's file may name folders."""
    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(content, "PNG")
    return content.getvalue()
