"""Share an adapter on the Hugging Face Hub, with a model card that says what it is and how to use it."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import get_session, logging, validate_repo_id
from PIL import Image
from safetensors.torch import save

from lorabook.lora.formats.keys import METADATA_KEY, WEIGHT_NAME
from lorabook.lora.metadata import outgoing, outgoing_command, outgoing_file, parse_json
from lorabook.lora.source import find_adapter, read_adapter
from lorabook.machine.environment import secret
from lorabook.worlds import bundled

HALF_NAME, GRID_NAME = "pytorch_lora_weights_fp16.safetensors", "images/grid.png"
SECONDS = (
    10,
    60,
    60,
    60,
)  # to connect, read, write and get a connection; huggingface_hub itself would wait forever
_REMEDY = (
    "set HF_TOKEN, make a Colab or Kaggle secret of that name, or run `hf auth login`, "
    "with a token that has «write» permission"
)
_USE = """## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}")
pipe.load_lora_weights("{repo_id}")
image = pipe({prompt}).images[0]
```

With lorabook: `pipe = lb.load_pipeline("{base}")`, then `lb.load_adapter(pipe, "{repo_id}")`."""


def find_token(token: str | None = None) -> str | None:
    """The token for the Hub: the one given, else from HF_TOKEN, `hf auth login`, Colab's or Kaggle's secrets."""
    return (token or "").strip() or get_token() or secret("HF_TOKEN")[0]


def open_repository(repo_id: str, token: str | None = None, *, private: bool = False) -> str:
    """Create a model repository on the Hub, or find it there, and make sure that the token may write to it.

    Args:
        repo_id: "name" or "owner/name".
        token: see `find_token`.
        private: whether a new repository is private; False leaves it to the owner's settings.
    Returns: its full id, "owner/name".
    Raises: ValueError as `client`, and if the Hub refuses the token; ConnectionError if the Hub cannot be reached.
    """
    api = client(repo_id, token)
    with _asking(repo_id, api.token):
        found = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        # what a commit asks first: a token that may only read is refused here, not after hours of training
        api.preupload_lfs_files(found, [CommitOperationAdd("README.md", b"")])
    return found


def push_adapter(
    source,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    fp16: bool = False,
    licence: str | None = None,
    prompts: Sequence[str] = (),
    commit_message: str | None = None,
) -> str:
    """Put an adapter on the Hub, in one commit with a model card and its pictures.

    Args:
        source: a TrainingRun, a folder, an adapter file or a bundled name. Beside the adapter only the sample grid and
            the last pictures in the folder's `validation/` are sent.
        repo_id, token, private: see `open_repository`.
        fp16: send a copy in half precision too.
        licence: by the Hub's name for it ("mit", "creativeml-openrail-m" …).
        prompts: examples for the card.
        commit_message: None says "Upload LoRA adapter".
    Returns: the repository's URL.
    Raises: FileNotFoundError if there is no such adapter; ValueError if it is damaged, beyond half precision or holds
        the token, and as in `open_repository`; ConnectionError. What is on this machine stays as it is.
    """
    path = find_adapter(source)
    weights, metadata = read_adapter(path)
    files = {WEIGHT_NAME: outgoing_file(path)} | (
        {HALF_NAME: _half(path, weights, outgoing(metadata))} if fp16 else {}
    )
    pictures = _pictures(
        source, path, parse_json(metadata.get("training")).get("validation_prompt") or ""
    )
    try:
        api = client(repo_id, token)
        repo_id = open_repository(repo_id, api.token, private=private)
        card = model_card(
            path,
            repo_id,
            licence=licence,
            prompts=prompts,
            command=getattr(source, "command", None),
            pictures={name: prompt for name, (prompt, _) in pictures.items()},
        )
        files |= {name: content for name, (_, content) in pictures.items()} | {
            "README.md": card.encode()
        }
        looked = [
            *files.items(),
            (path.name, path.read_bytes()),
        ]  # as it lies here, too: it would be given on as it is
        if holders := [name for name, content in looked if api.token.encode() in content]:
            raise ValueError(
                f"{repo_id}: nothing was sent, as {holders[0]} would hold the token; train without it there"
            )
        # an open file goes over plain HTTP; a path or bytes by Xet, a second service that mirrors and firewalls may lack
        additions = [
            CommitOperationAdd(name, io.BytesIO(content)) for name, content in files.items()
        ]
        with _asking(repo_id, api.token):
            api.create_commit(
                repo_id,
                additions,
                commit_message=commit_message or "Upload LoRA adapter",
                num_threads=1,
            )  # equal files would be read by two threads from one open file
    except (ValueError, ConnectionError) as error:
        raise type(error)(f"{str(error)[:280]}; the adapter is still in {path}"[:400]) from None
    return f"{api.endpoint}/{repo_id}"


def client(repo_id: str, token: str | None = None) -> HfApi:
    """The Hub's client for a repository; asks nothing yet. Raises ValueError for a malformed id or without a token."""
    try:
        validate_repo_id(repo_id or "")
    except ValueError:
        raise ValueError(
            f"{str(repo_id)[:100]!r} cannot be a repository's id; give name or owner/name, of letters, "
            "digits, - _ and ., at most 96 in all"
        ) from None
    found = find_token(token)
    if not found:
        raise ValueError(
            f"{repo_id}: there is no token for the Hub; {secret('HF_TOKEN')[1] or _REMEDY}"
        )
    if not re.fullmatch("[!-~]+", found):
        raise ValueError(
            f"{repo_id}: the token for the Hub has blanks or letters that no token has; copy it anew"
        )
    return HfApi(token=found)


@contextmanager
def _asking(repo_id: str, token: str):
    """Time limits for the Hub's answers, and a failure told in one sentence without the token."""
    session, verbosity = get_session(), logging.get_verbosity()
    timeout, session.timeout = session.timeout, SECONDS
    logging.set_verbosity_error()
    try:
        yield
    except (
        Exception
    ) as error:  # the classes are those of whichever HTTP library huggingface_hub uses
        raise _told(
            repo_id, token, error
        ) from None  # what is below may quote a request with its token
    finally:
        session.timeout = timeout
        logging.set_verbosity(verbosity)


def _told(repo_id: str, token: str, error: Exception) -> Exception:
    answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    reason = " ".join(
        str(getattr(error, "server_message", None) or error).replace(token, "…").split()
    )[:120]
    said = (
        f"refused the token ({status}); {_REMEDY}"
        if status in (401, 403)
        else f"answered {status}: {reason}"
        if status
        else f"cannot be reached: {reason}"
    )
    kind = ValueError if 400 <= status < 500 and status not in (408, 429) else ConnectionError
    return kind(f"{repo_id}: the Hub {said}")


def _half(path: Path, weights: dict, metadata: dict) -> bytes:
    """The adapter file in half precision."""
    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in weights.items()
    }
    for key, value in half.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{path} has weights beyond half precision, for example {key}; push it without fp16"
            )
    return save(half, metadata)


def _pictures(source, path: Path, prompt: str) -> dict[str, tuple[str, bytes]]:
    """The sample grid and the last validation pictures, with their prompts, by name in the repository."""
    run, grid, found = hasattr(source, "adapter"), getattr(source, "grid", None), {}
    folder = (
        path.parent if run or Path(source).expanduser().is_dir() else None
    )  # beside a file may lie anything
    if grid:
        found[GRID_NAME] = "", grid._repr_png_()
    elif folder and (folder / "grid.png").is_file():
        found[GRID_NAME] = "", _bare(folder / "grid.png")
    drawn = sorted((folder / "validation").glob("step-*_seed-*.png")) if folder and prompt else []
    last = [p for p in drawn if p.name.split("_")[0] == drawn[-1].name.split("_")[0]]
    return found | {f"images/{p.name}": (prompt, _bare(p)) for p in last[:4]}


def _bare(path: Path) -> bytes:
    """A picture's pixels without the texts in its file; a saved grid's hold the settings, which may name folders."""
    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(content, "PNG")
    return content.getvalue()


def model_card(
    path: Path,
    repo_id: str,
    *,
    licence: str | None = None,
    prompts: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
    command: str | None = None,
) -> str:
    """The README.md of an adapter's repository, from what the adapter file says of itself.

    Args:
        path: the adapter file.
        repo_id, licence, prompts: see `push_adapter`.
        pictures: prompts by the pictures' names in the repository.
        command: the command line that trained it.
    Returns: YAML front matter and Markdown, without tokens and without this machine's folders.
    Raises: ValueError if the file is damaged.
    """
    weights, metadata = read_adapter(path)
    metadata = outgoing(metadata)
    base, words, pictures = (
        metadata.get("base_model"),
        parse_json(metadata.get("trigger_words"), list),
        pictures or {},
    )
    wide = any(
        "text_encoder_2." in key or ("attn2.to_k" in key and 2048 in value.shape)
        for key, value in weights.items()
    )
    examples = [
        {"text": prompt, "output": {"url": name}} for name, prompt in pictures.items() if prompt
    ]
    examples += [{"text": prompt} for prompt in prompts if prompt not in pictures.values()]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        inference=True,
        widget=examples or None,
        instance_prompt=metadata.get("instance_prompt") or next(iter(words), None),
        tags=[
            "text-to-image",
            "diffusers",
            "lora",
            "diffusers-training",
            "stable-diffusion-xl" if wide else "stable-diffusion",
            "template:sd-lora",
        ],
    )
    body = _body(repo_id, metadata, base or "its base model", words, examples, pictures, command)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _body(
    repo_id: str, metadata: dict, base: str, words: list, examples: list, pictures: Mapping, command
) -> str:
    link = f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else Path(base).name
    model = base if _on_hub(base) else f"path/to/{Path(base).name}"
    prompt = examples[0]["text"] if examples else next(iter(words), "a prompt")
    cells = {
        key: " ".join(str(value).split()).replace("|", r"\|")
        for key, value in _settings(metadata).items()
    }
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"A LoRA adapter for {link}{', which comes with lorabook' if bundled(base) else ''}.",
        f"![Sample pictures]({GRID_NAME})" if GRID_NAME in pictures else "",
        "<Gallery />" if any(pictures.values()) else "",
        f"## Trigger words\n\n{', '.join(f'`{word}`' for word in words)}" if words else "",
        _USE.format(
            model=model,
            base=base if bundled(base) else model,
            repo_id=repo_id,
            prompt=json.dumps(prompt, ensure_ascii=False),
        ),
        "## Training\n\n| setting | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {value} |" for key, value in cells.items())
        if cells
        else "",
        f"The command that made it:\n\n```bash\n{outgoing_command(command)}\n```"
        if command
        else "",
    ]
    return "\n\n".join(section for section in sections if section)


def _settings(metadata: dict) -> dict[str, object]:
    """Ranks, alphas and the training settings, as far as others may see them."""
    lora, rows = parse_json(metadata.get(METADATA_KEY)), {}
    for name, label in (("r", "rank"), ("lora_alpha", "alpha")):
        for part in (key.removesuffix(f".{name}") for key in lora if key.endswith(f".{name}")):
            values = {lora[f"{part}.{name}"], *(lora.get(f"{part}.{label}_pattern") or {}).values()}
            rows[f"{label}, {part}"] = ", ".join(str(value) for value in sorted(values))
    return rows | parse_json(metadata.get("training"))


def _on_hub(model: str | None) -> bool:
    """Whether a base model's name is a Hub id."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model or "")) and not Path(model).exists()
