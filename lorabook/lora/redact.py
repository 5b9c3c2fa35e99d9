"""What may leave this machine: metadata without its folders, without tokens, with names and Hub ids alone."""

import json
import os
import re
import shlex
import struct
from collections.abc import Mapping
from pathlib import Path

_PART = r"""(?:[^\s"'<>|;,)]|\ (?=[^\s/\\"']*[/\\]))*"""  # a blank belongs to a path where the next word goes on with it
_START = r"""(?x:file:/+ | (?<![\w~])~[\w.-]*[\\/] | (?<!\w)\$\{?\w+\}?[\\/] | %\w+%[\\/]
    | (?<![A-Za-z])[A-Za-z]:[\\/](?!/) | (?<!\\)\\\\[\w.$-]+\\ | (?<![\w.])\.{1,2}[\\/](?=\w))"""
_PATH = re.compile(_START + _PART + r"""|(?<![\w./\\<>~}-])/[^\s/"'<>|;,)]+/""" + _PART)
_WHOLE = re.compile(rf"{_START}|[/\\](?=\w)|/\.|~$")  # what a text that is one path begins with
_RELATIVE = re.compile(
    r"[A-Za-z_][\w.@+-]*(?:/[\w.@+-]+){2,}/?"
    r"|[\w.@+ -]+(?:\\[\w.@+ -]+)+\.(?:safetensors|ckpt|pth?|bin|png|jpe?g|webp|json|toml|txt|ya?ml)"
)
_PATTERNS = re.compile(
    r".*(?:_modules|_pattern|_parameters|_to_save)"
)  # of a LoraConfig: layers' names, perhaps as a regex
_HOME = re.compile(
    r"(?:.*[\\/:])?(?:home|users)[\\/]+[^\\/]+[\\/]*|(?:file:)?/+root/*|~[\w.-]*[\\/]*",
    re.IGNORECASE,
)
_CACHED = re.compile(
    r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)"
)  # a folder of the Hub's cache tells the id
_ADDRESS = re.compile(r"""(https?://)(?:[^\s/@"']*@)?([^\s?#"'<>]+)([?#][^\s"'<>]*)?""")
_KEYED = re.compile("token|key|sig|secret|passw|auth", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r".*(?:token|passw(?:or)?d|secret|api[_-]?key|access[_-]?key)", re.IGNORECASE
)
_WORD_NAME = re.compile(
    r"(?:.*[_.])?(?:placeholder|initializer|trigger|instance|class|concept|per|pad|[be]os|unk)_token"
)
_SECRET = re.compile(
    r"(?:token|passw(?:or)?d|secret|api_?key|access_?key|signature)=[^\s=]|--?[\w-]*token\s+[^\s-]"
    r"|\bbearer\s+\S{16}|\b(?:hf|ghp|gho|ghs|ghu)_[a-z0-9]{16}|\bsk-[a-z0-9-]{20}",
    re.IGNORECASE,
)


def shareable(value):
    """Settings without tokens and without the folders of a machine: of a path its last part, of a home nothing."""
    if isinstance(value, dict):
        return {
            shareable(key) if isinstance(key, str) else key: shareable(inner)
            for key, inner in value.items()
            if not (_names_secret(key) or _holds_secret(inner))
        }
    if isinstance(value, (list, tuple)):
        return [shareable(inner) for inner in value if not _holds_secret(inner)]
    return _text(value) if isinstance(value, str) else value


def outgoing(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata as others may see them; JSON inside is looked through, and what needs no change stays as it is."""
    cleaned = {}
    for key, text in shareable(dict(metadata)).items():
        value = _parsed(metadata.get(key, text))
        if value is not None:
            better = shareable(value)
            if isinstance(better, dict):
                better |= {
                    name: entry for name, entry in value.items() if _PATTERNS.fullmatch(name)
                }
            if key == "training" and isinstance(
                better, dict
            ):  # where lorabook's own run lay is of no use to others
                better = {
                    name: entry for name, entry in better.items() if not name.endswith("_dir")
                }
            text = metadata[key] if better == value else json.dumps(better)
        cleaned[key] = text
    return cleaned


def public_name(model: str) -> str:
    """What others may call a base model or a data set; of a folder its name, or the Hub id of that name that it records."""
    folder = Path(os.path.expanduser(model))  # a Path's own raises where there is no such user
    if not model or not os.path.exists(folder):
        return shareable(model)
    index = folder / "model_index.json"
    recorded = str(
        (_parsed(index.read_text()) or {}).get("_name_or_path") if index.is_file() else ""
    )
    name = name_of_path(str(folder.absolute()))
    return recorded if re.fullmatch(rf"[\w.-]+/{re.escape(name)}", recorded) else name


def outgoing_file(path: Path) -> bytes:
    """The content of a .safetensors file with its metadata as others may see them; its weights are the same bytes."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    told = header.get("__metadata__") or {}
    cleaned = outgoing(told)
    if cleaned == told:
        return content
    written = json.dumps(
        header | {"__metadata__": cleaned}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    written += b" " * (-len(written) % 8)  # where the weights begin is a multiple of 8
    return struct.pack("<Q", len(written)) + written + content[end:]


def name_of_path(path: str) -> str:
    """What a path is called: a Hub id, where it lies in the Hub's cache, else its last part; nothing for someone's home."""
    if cached := _CACHED.search(path):
        return f"{cached[1]}/{cached[2]}"
    return "" if _HOME.fullmatch(path) else re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def outgoing_command(command: str) -> str:
    """A command line without tokens and without where it writes to; other paths by their last part."""
    kept, follows = [], False
    for word in shlex.split(command):
        flag, value = re.fullmatch(r"(--?[\w-]+=?)?(.*)", word, re.DOTALL).groups("")
        private = _names_secret(flag.strip("-=")) or flag.strip("-=") in (
            "output_dir",
            "logging_dir",
            "cache_dir",
        )
        if not (private or _holds_secret(value) or follows and not flag):
            kept.append(flag + (shlex.quote(shareable(value)) if value else ""))
        follows = private and not flag.endswith("=")
    return " ".join(kept)


def _parsed(text: str):
    """The dictionary or list that a text is the JSON of, or None."""
    try:
        value = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _names_secret(key) -> bool:
    return bool(_SECRET_NAME.fullmatch(str(key)) and not _WORD_NAME.fullmatch(str(key)))


def _holds_secret(value) -> bool:
    return (
        isinstance(value, str)
        and _parsed(value) is None
        and bool(_SECRET.search(_addresses(value)))
    )


def _text(text: str) -> str:
    text = _addresses(text)
    starts = list(_PATH.finditer(text))
    if (_WHOLE.match(text) and len(starts) <= 1) or _RELATIVE.fullmatch(text):
        return name_of_path(text)
    return _PATH.sub(lambda found: name_of_path(found[0]), text)


def _addresses(text: str) -> str:
    """The text with its web addresses without user, password and a query that holds a token."""
    return _ADDRESS.sub(
        lambda found: (
            found[1] + found[2] + ("" if _KEYED.search(found[3] or "") else found[3] or "")
        ),
        text,
    )
