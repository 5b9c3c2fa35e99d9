"""Adapters behind a web address: fetched once, checked, and kept in the cache."""

import hashlib
import os
import re
import shutil
import ssl
import string
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock
from tqdm.auto import tqdm

from lorabook.lora.file_kind import kind_of, opened
from lorabook.lora.pickles import PICKLES
from lorabook.lora.repository import Repository, hub_file
from lorabook.machine.environment import secret

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CIVITAI = ("civitai.com", "www.civitai.com")
CIVITAI_NAMES = ("CIVITAI_TOKEN", "CIVITAI_API_TOKEN", "CIVITAI_API_KEY")
SECONDS = 30  # without a byte from the site


def fetch_adapter(
    url: str,
    *,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """The local copy of an adapter file that has an address; it is downloaded the first time only.

    Args:
        url: an https address, as CivitAI's download links and the Hub's of a file are; http on the loopback address only.
            Without its query, as reports and code show it, it stands for the file that was fetched with one before.
        token: for that site, and sent to no other that it hands on to; None takes CivitAI's from CIVITAI_TOKEN,
            CIVITAI_API_TOKEN, CIVITAI_API_KEY or a secret of such a name on Colab or Kaggle, and the Hub's as its client
            does.
        cache_dir: a folder for what is fetched; None is below the user's cache folder. A Hub file goes to the Hub's cache.
        local_files_only: take it from the cache or not at all.
        allow_pickle: fetch an old .bin, .pt or .ckpt too; it is not opened.
    Returns: the file; its name is the one that the site gives it.
    Raises: FileNotFoundError if there is no such file, it is not in the cache, or the site does not give it; ValueError
        for another kind of address, a pickle file, what is no adapter file, and where the site wants a token.
    """
    url = _checked(url)
    if asked := hub_file(url):
        _check_name(asked["filename"].split("/")[-1], allow_pickle, _shown(url))
        return _from_hub(asked, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = _cache_folder(cache_dir) / _key(url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another process may be fetching the same
        path = _kept(folder) or _fetched(url, folder, token, allow_pickle, local_files_only)
    _check_name(path.name, allow_pickle, _shown(url))
    return path


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits, as CivitAI and the Hub show it beside a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(url: str) -> str:
    """The address with blanks and letters beyond ASCII spelt as HTTP wants them."""
    url = quote(url.strip(), safe=string.punctuation)
    try:
        parts = urlsplit(url)
        known = parts.hostname and parts.port != 0  # a port that is no number is a ValueError here
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{_shown(url)!r} is not a web address; give https://site/path/of/a/file")
    if parts.username is not None:
        raise ValueError(f"{_shown(url)}: give token= instead of a user name in the address")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(
            f"{_shown(url)}: only https addresses are fetched, since anyone on the way can change what comes "
            "by others; give its https address, or download the file and give its path"
        )
    return url


def shareable_address(text: str) -> str:
    """What may be kept and shown of where an adapter is from: an address without its user, query and fragment.

    What stands behind the question mark may be a token. Anything that is no address comes back as it is.
    """
    found = re.match(r"\s*([a-z][a-z0-9+.-]+:/+)(?:[^/?#]*@)?([^?#]*)", text, re.IGNORECASE)
    if found:
        return f"{found[1]}{found[2].strip()}"
    return (
        text.partition("?")[0] if re.match(r"\s*[\w-]+(\.[\w-]+)+(:\d+)?/[^?]*\?", text) else text
    )


def _shown(url: str) -> str:
    return shareable_address(url)[:150]


def _cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        Path(cache_dir).expanduser() / "lorabook-adapters"
        if cache_dir
        else home / "lorabook" / "adapters"
    )


def _key(url: str) -> str:
    """The cache's name for an address, and behind a dash for its query; a token in it makes no other file of it."""
    parts = urlsplit(url)
    query = "&".join(part for part in parts.query.split("&") if not part.startswith("token="))
    pieces = parts._replace(query="", fragment="").geturl(), query
    return "-".join(hashlib.sha256(piece.encode()).hexdigest()[:24] for piece in pieces if piece)


def _kept(folder: Path) -> Path | None:
    files = folder.iterdir() if folder.is_dir() else ()
    return next((path for path in files if path.suffix in (".safetensors", *PICKLES)), None)


def _kept_with_query(folder: Path) -> Path | None:
    """Of an address without a query the file that was fetched from it with one, where there is one such file."""
    found = [path for other in folder.parent.glob(f"{folder.name}-*") if (path := _kept(other))]
    return found[0] if len(found) == 1 else None


def _fetched(
    url: str, folder: Path, token: str | None, allow_pickle: bool, local_files_only: bool
) -> Path:
    try:
        if local_files_only:
            raise FileNotFoundError(
                f"{_shown(url)} is not in the cache {folder.parent}; fetch it once with the network"
            )
        return _download(url, folder, _token_for(url, token), allow_pickle)
    except (FileNotFoundError, ValueError):
        if path := _kept_with_query(folder):
            return path
        raise


def _token_for(url: str, token: str | None) -> str | None:
    found = (token or "").strip()
    if not found and _is_civitai(url):
        told = [os.environ.get(name) or secret(name)[0] for name in CIVITAI_NAMES]
        found = next((value.strip() for value in told if value and value.strip()), "")
    if not re.fullmatch("[!-~]*", found):
        raise ValueError(
            f"the token for {_shown(url)} has blanks or letters that no token has; copy it anew"
        )
    return found or None


class _Redirects(HTTPRedirectHandler):
    """Follows a site to where its files lie, by https only, and takes the token to no other site."""

    def redirect_request(self, request, *answer):
        following = super().redirect_request(request, *answer)
        url = _checked(following.full_url)
        if request.type == "https" and following.type != "https":
            raise ValueError(
                f"{_shown(url)}: {request.host} hands on to an address without https; download the file "
                "and give its path"
            )
        if (following.type, following.host) != (request.type, request.host):
            following.remove_header("Authorization")
        return following


def _download(url: str, folder: Path, token: str | None, allow_pickle: bool) -> Path:
    headers = {"User-Agent": "lorabook"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with build_opener(_Redirects).open(
            Request(url, headers=headers), timeout=SECONDS
        ) as answer:
            name = _file_name(answer)
            _check_name(name, allow_pickle, _shown(url))
            folder.mkdir(exist_ok=True)
            return _keep(answer, folder / name, url)
    except HTTPError as error:
        raise _refused(url, error.code, token) from None  # what is below may quote a signed address
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = (
            re.sub(r"\?\S*", "?…", " ".join(str(getattr(error, "reason", error)).split()))
            or type(error).__name__
        )
        raise FileNotFoundError(
            f"{_shown(url)} cannot be reached, or broke off: {reason:.120}; try again"
        ) from None


def _keep(answer: HTTPResponse, path: Path, url: str) -> Path:
    """Write what comes beside its place, and move it there when it is whole and what it should be."""
    unfinished, size = path.with_name(path.name + ".part"), answer.length
    try:
        with (
            open(unfinished, "wb") as file,
            tqdm.wrapattr(answer, "read", total=size, desc=path.name, leave=False) as body,
        ):
            shutil.copyfileobj(body, file, 1 << 20)
        got = unfinished.stat().st_size
        if size is not None and got != size:
            raise FileNotFoundError(
                f"{_shown(url)} broke off after {got:,} of {size:,} bytes; try again"
            )
        _check_content(unfinished, path, url)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _file_name(answer: HTTPResponse) -> str:
    """The name that the site gives the file, or the last part of its address; no folders, and a known ending."""
    told = answer.headers.get_filename() or unquote(urlsplit(answer.url).path)
    name = re.sub(r"[^\w.()+ -]", "_", re.split(r"[/\\]", told)[-1]).strip(" .")
    stem, ending = os.path.splitext(name)
    if ending.lower() not in (".safetensors", *PICKLES):
        stem, ending = name, ".safetensors"
    return (stem.encode()[:150].decode(errors="ignore") or "adapter") + ending.lower()


def _check_name(name: str, allow_pickle: bool, where: str) -> None:
    if Path(name).suffix.lower() in PICKLES and not allow_pickle:
        raise ValueError(
            f"{where} is a pickle file ({name}), which can run code when it is opened; get it as "
            ".safetensors, or give allow_pickle=True to read its weights only"
        )


def _check_content(path: Path, target: Path, url: str) -> None:
    kind = kind_of(path)
    if "web page" in kind:
        raise ValueError(
            f"{_shown(url)} gave a web page, not a file; give the link of the file's download button, or, "
            f"where the site wants you to log in, {_remedy(url)}"
        )
    if target.suffix != ".safetensors":
        return
    try:
        with opened(path):
            pass
    except ValueError:
        raise ValueError(
            f"{_shown(url)} gave no safetensors file: it is {kind:.120}; look at what it is in a browser, "
            "and give the link of a .safetensors file"
        ) from None


def _refused(url: str, status: int, token: str | None) -> Exception:
    if status in (401, 403):
        said = "refuses the file in spite of the token" if token else "wants a token"
        return ValueError(f"{_shown(url)}: the site {said} ({status}); {_remedy(url)}")
    if status in (404, 410):
        return FileNotFoundError(
            f"{_shown(url)}: there is no such file ({status}); copy the link of the file's download "
            "button anew"
        )
    return FileNotFoundError(f"{_shown(url)}: the site answered {status}; try again later")


def _remedy(url: str) -> str:
    if _is_civitai(url):
        return (
            f"make a token in your account's settings there and set {CIVITAI_NAMES[0]}, make a Colab secret of that "
            "name, or give token="
        )
    return "make a token in your account there and give token="


def _is_civitai(url: str) -> bool:
    """Whether its token may go there: to that very site at its usual port, to no other that sounds alike."""
    parts = urlsplit(url)
    return parts.hostname in CIVITAI and (parts.port in (None, 443) or parts.hostname in LOOPBACK)


def _from_hub(asked: dict[str, str], **hub) -> Path:
    """The file, from the cache where it is there, without asking the Hub."""
    reason = "the Hub did not give it: no such file"
    try:
        path = Repository(asked["repo_id"], revision=asked["revision"], kept_first=True, **hub).get(
            asked["filename"]
        )
    except FileNotFoundError as error:
        path, reason = None, str(error).partition(" not found: ")[2]
    if path is None:
        raise FileNotFoundError("{filename} of {repo_id} not found: ".format(**asked) + reason)
    return path
