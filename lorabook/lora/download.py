"""Adapter files behind web addresses: fetched once, checked, kept in a cache."""

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

from lorabook.lora.files import PICKLES, brief, check_no_pickle, kind_of, open_safetensors
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
    """The local copy of an adapter file that has an address, downloaded the first time only.

    Without its query, as reports and code show it, an address stands for the file that was fetched
    with one before. The token is sent to that site only; None takes CivitAI's from the environment
    or from Colab's or Kaggle's secrets. FileNotFoundError where the site, or the cache, does not
    give it; ValueError for no address, a pickle, no adapter file, and a site that wants a token.
    """
    url = checked_address(url)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorabook/adapters"
    cache = Path(cache_dir).expanduser() / "lorabook-adapters" if cache_dir else home
    cache.mkdir(parents=True, exist_ok=True)
    # a folder for each address and query; a token makes no other file of it
    address, _, query = url.partition("#")[0].partition("?")
    query = "&".join(part for part in query.split("&") if not part.startswith("token="))
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in (address, query) if text]
    folder = cache / "-".join(hashes)
    with FileLock(f"{folder}.lock"):  # another process may be fetching the same
        path = _cached(folder)
        try:
            if path is None and local_files_only:
                raise FileNotFoundError(
                    f"{brief(url)} is not in the cache {cache}; fetch it once with the network"
                )
            path = path or _download(url, folder, _token_for(url, token), allow_pickle)
        except (FileNotFoundError, ValueError):
            with_query = [_cached(other) for other in cache.glob(f"{folder.name}-*")]
            with_query = [other for other in with_query if other]
            if len(with_query) != 1:
                raise
            path = with_query[0]
    check_no_pickle(path.name, brief(url), allow_pickle)
    return path


def checked_address(url: str) -> str:
    """The address spelt as HTTP wants it; ValueError for what is none, or not safe."""
    url = quote(url.strip(), safe=string.punctuation)
    try:
        parts = urlsplit(url)
        is_address = parts.hostname and parts.port != 0  # no number as a port is a ValueError
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"{brief(url)!r} is not a web address; give https://site/path/of/a/file")
    if parts.username is not None:
        raise ValueError(f"{brief(url)}: give token= instead of a user name in the address")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(
            f"{brief(url)}: only https addresses are fetched; give its https address, or download "
            "the file and give its path"
        )
    return url


class _Redirects(HTTPRedirectHandler):
    """Follows a site to where its files lie, by https only; the token goes to no other site."""

    def redirect_request(self, request, *answer):
        following = super().redirect_request(request, *answer)
        url = checked_address(following.full_url)
        if request.type == "https" and following.type != "https":
            raise ValueError(
                f"{brief(url)}: {request.host} hands on to an address without https; download the "
                "file and give its path"
            )
        if (following.type, following.host) != (request.type, request.host):
            following.remove_header("Authorization")
        return following


def _cached(folder: Path) -> Path | None:
    files = folder.iterdir() if folder.is_dir() else ()
    return next((path for path in files if path.suffix in (".safetensors", *PICKLES)), None)


def _token_for(url: str, token: str | None) -> str | None:
    tokens = [token]
    if not (token or "").strip() and _is_civitai(url):
        tokens = [os.environ.get(name) or secret(name)[0] for name in CIVITAI_NAMES]
    token = next((value.strip() for value in tokens if value and value.strip()), None)
    if token and not re.fullmatch("[!-~]*", token):
        raise ValueError(
            f"the token for {brief(url)} has blanks or letters that no token has; copy it anew"
        )
    return token


def _is_civitai(url: str) -> bool:
    """Whether CivitAI's token may go there: to that very site at its usual port."""
    parts = urlsplit(url)
    return parts.hostname in CIVITAI and (parts.port in (None, 443) or parts.hostname in LOOPBACK)


def _download(url: str, folder: Path, token: str | None, allow_pickle: bool) -> Path:
    headers = {"User-Agent": "lorabook"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = Request(url, headers=headers)
    try:
        with build_opener(_Redirects).open(request, timeout=SECONDS) as answer:
            name = _file_name(answer)
            check_no_pickle(name, brief(url), allow_pickle)
            folder.mkdir(exist_ok=True)
            return _save(answer, folder / name, url)
    except HTTPError as error:  # the cause may quote a signed address
        raise _refusal(brief(url), error.code, token, _remedy(url)) from None
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        text = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        text = re.sub(r"\?\S*", "?…", text)
        raise FileNotFoundError(
            f"{brief(url)} cannot be reached, or broke off: {text:.120}; try again"
        ) from None


def _file_name(answer: HTTPResponse) -> str:
    """The name that the site or the address gives it, without folders, with a known ending."""
    name = answer.headers.get_filename() or unquote(urlsplit(answer.url).path)
    name = re.sub(r"[^\w.()+ -]", "_", re.split(r"[/\\]", name)[-1]).strip(" .")
    stem, ending = os.path.splitext(name)
    if ending.lower() not in (".safetensors", *PICKLES):
        stem, ending = name, ".safetensors"
    return (stem.encode()[:150].decode(errors="ignore") or "adapter") + ending.lower()


def _save(answer: HTTPResponse, path: Path, url: str) -> Path:
    """Write what comes beside its place, and move it there when it is a whole adapter file."""
    unfinished, total = path.with_name(f"{path.name}.part"), answer.length
    try:
        bar = tqdm.wrapattr(answer, "read", total=total, desc=path.name, leave=False)
        with open(unfinished, "wb") as file, bar as body:
            shutil.copyfileobj(body, file, 1 << 20)
        size = unfinished.stat().st_size
        if total is not None and size != total:
            raise FileNotFoundError(
                f"{brief(url)} broke off after {size:,} of {total:,} bytes; try again"
            )
        kind = kind_of(unfinished)
        if "web page" in kind:
            raise ValueError(
                f"{brief(url)} gave a web page, not a file; give the link of the file's download "
                f"button, or, where the site wants you to log in, {_remedy(url)}"
            )
        if path.suffix == ".safetensors" and not _is_safetensors(unfinished):
            raise ValueError(
                f"{brief(url)} gave no safetensors file: it is {kind:.120}; look at what it is in "
                "a browser, and give the link of a .safetensors file"
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _is_safetensors(path: Path) -> bool:
    try:
        with open_safetensors(path):
            return True
    except ValueError:
        return False


def _refusal(address: str, status: int, token: str | None, remedy: str) -> Exception:
    if status in (401, 403):
        reason = "refuses the file in spite of the token" if token else "wants a token"
        return ValueError(f"{address}: the site {reason} ({status}); {remedy}")
    if status in (404, 410):
        return FileNotFoundError(
            f"{address}: there is no such file ({status}); copy the link of the file's download "
            "button anew"
        )
    return FileNotFoundError(f"{address}: the site answered {status}; try again later")


def _remedy(url: str) -> str:
    if not _is_civitai(url):
        return "make a token in your account there and give token="
    return (
        f"make a token in your account's settings there and set {CIVITAI_NAMES[0]}, make a Colab "
        "secret of that name, or give token="
    )
