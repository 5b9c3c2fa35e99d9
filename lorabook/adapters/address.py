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
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from lorabook.adapters.pickles import PICKLES
from lorabook.places import secret

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CIVITAI = ("civitai.com", "www.civitai.com", "civitai.red", "www.civitai.red")
CIVITAI_NAMES = ("CIVITAI_TOKEN", "CIVITAI_API_TOKEN", "CIVITAI_API_KEY")
SECONDS = 30  # without a byte from the site
_HUB_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/(refs/(?:pr|convert)/[^/]+|[^/]+)/(.+)")


def fetch_adapter(url: str, *, token: str | None = None, cache_dir: str | os.PathLike | None = None,
                  local_files_only: bool = False, allow_pickle: bool = False) -> Path:
    """The local copy of an adapter file that has an address; it is downloaded the first time only.

    Args:
        url: an https address, as CivitAI's download links and the Hub's of a file are; http on the loopback address only.
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
    if asked := _hub_file(url):
        _check_name(asked["filename"].split("/")[-1], allow_pickle, _shown(url))
        return _from_hub(asked, token, cache_dir, local_files_only)
    folder = _cache_folder(cache_dir) / _key(url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another process may be fetching the same
        path = _kept(folder)
        if path is None and local_files_only:
            raise FileNotFoundError(f"{_shown(url)} is not in the cache {folder.parent}; fetch it once with the network")
        path = path or _download(url, folder, _token_for(url, token), allow_pickle)
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
        raise ValueError(f"{url[:150]!r} is not a web address; give https://site/path/of/a/file")
    if parts.username is not None:
        raise ValueError(f"{_shown(url)}: give token= instead of a user name in the address")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"{_shown(url)}: only https addresses are fetched, since anyone on the way can change what comes "
                         "by others; give its https address, or download the file and give its path")
    return url


def _shown(url: str) -> str:
    """The address as a message may show it: what stands behind the question mark may be a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:150]


def _cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(cache_dir).expanduser() / "lorabook-adapters" if cache_dir else home / "lorabook" / "adapters"


def _key(url: str) -> str:
    """The cache's name for an address; a token in it makes no other file of it."""
    parts = urlsplit(url)
    query = "&".join(part for part in parts.query.split("&") if not part.startswith("token="))
    return hashlib.sha256(parts._replace(query=query, fragment="").geturl().encode()).hexdigest()[:32]


def _kept(folder: Path) -> Path | None:
    files = folder.iterdir() if folder.is_dir() else ()
    return next((path for path in files if path.suffix in (".safetensors", *PICKLES)), None)


def _token_for(url: str, token: str | None) -> str | None:
    found = (token or "").strip()
    if not found and urlsplit(url).hostname in CIVITAI:
        told = [os.environ.get(name) or secret(name)[0] for name in CIVITAI_NAMES]
        found = next((value.strip() for value in told if value and value.strip()), "")
    if not re.fullmatch("[!-~]*", found):
        raise ValueError(f"the token for {_shown(url)} has blanks or letters that no token has; copy it anew")
    return found or None


class _Redirects(HTTPRedirectHandler):
    """Follows a site to where its files lie, by https only, and takes the token to no other site."""

    def redirect_request(self, request, *answer):
        following = super().redirect_request(request, *answer)
        url = _checked(following.full_url)
        if request.type == "https" and following.type != "https":
            raise ValueError(f"{_shown(url)}: {request.host} hands on to an address without https; download the file "
                             "and give its path")
        if (following.type, following.host) != (request.type, request.host):
            following.remove_header("Authorization")
        return following


def _download(url: str, folder: Path, token: str | None, allow_pickle: bool) -> Path:
    headers = {"User-Agent": "lorabook"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with build_opener(_Redirects).open(Request(url, headers=headers), timeout=SECONDS) as answer:
            name = _file_name(answer)
            _check_name(name, allow_pickle, _shown(url))
            folder.mkdir(exist_ok=True)
            return _keep(answer, folder / name, url)
    except HTTPError as error:
        raise _refused(url, error.code, token) from None  # what is below may quote a signed address
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:120] or type(error).__name__
        raise FileNotFoundError(f"{_shown(url)} cannot be reached, or broke off: {reason}; try again") from None


def _keep(answer: HTTPResponse, path: Path, url: str) -> Path:
    """Write what comes beside its place, and move it there when it is whole and what it should be."""
    unfinished, size = path.with_name(path.name + ".part"), answer.length
    try:
        with open(unfinished, "wb") as file, tqdm.wrapattr(answer, "read", total=size, desc=path.name, leave=False) as body:
            shutil.copyfileobj(body, file, 1 << 20)
        got = unfinished.stat().st_size
        if size is not None and got != size:
            raise FileNotFoundError(f"{_shown(url)} broke off after {got:,} of {size:,} bytes; try again")
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
        raise ValueError(f"{where} is a pickle file ({name}), which can run code when it is opened; get it as "
                         ".safetensors, or give allow_pickle=True to read its weights only")


def _check_content(path: Path, target: Path, url: str) -> None:
    with open(path, "rb") as file:
        start = file.read(512)
    if start.lstrip().startswith(b"<") and start[8:9] != b"{":  # a safetensors file has JSON from its ninth byte on
        raise ValueError(f"{_shown(url)} gave a web page, not a file; give the link of the file's download button, or, "
                         f"where the site wants you to log in, {_remedy(url)}")
    if target.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{_shown(url)} gave no safetensors file ({str(error)[:80]}); look at what it is in a browser, "
                         "and give the link of a .safetensors file") from None


def _refused(url: str, status: int, token: str | None) -> Exception:
    if status in (401, 403):
        said = "refuses the file in spite of the token" if token else "wants a token"
        return ValueError(f"{_shown(url)}: the site {said} ({status}); {_remedy(url)}")
    if status in (404, 410):
        return FileNotFoundError(f"{_shown(url)}: there is no such file ({status}); copy the link of the file's download "
                                 "button anew")
    return FileNotFoundError(f"{_shown(url)}: the site answered {status}; try again later")


def _remedy(url: str) -> str:
    if urlsplit(url).hostname in CIVITAI:
        return (f"make a token in your account's settings there and set {CIVITAI_NAMES[0]}, make a Colab secret of that "
                "name, or give token=")
    return "make a token in your account there and give token="


def _hub_file(url: str) -> dict[str, str] | None:
    """What the address of a file on the Hub asks for, be it of the file or of its page; None for other sites."""
    parts = urlsplit(url)
    found = _HUB_FILE.fullmatch(parts.path)
    if not found or parts.netloc not in ("huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc):
        return None
    return {"repo_id": found[1], "revision": unquote(found[2]), "filename": unquote(found[3])}


def _from_hub(asked: dict[str, str], token: str | None, cache_dir, local_files_only: bool) -> Path:
    kept = try_to_load_from_cache(**asked, cache_dir=cache_dir)
    if isinstance(kept, str):
        return Path(kept)
    try:
        if not local_files_only:  # ask once whether the Hub is there; hf_hub_download alone retries for half a minute
            HfApi(token=token).model_info(asked["repo_id"], revision=asked["revision"], timeout=10)
        return Path(hf_hub_download(**asked, token=token, cache_dir=cache_dir, local_files_only=local_files_only))
    except Exception as error:  # no network: the class is that of whichever HTTP library huggingface_hub uses
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FileNotFoundError(f"{asked['filename']} of {asked['repo_id']} not found: the Hub did not give it: "
                                f"{reason}") from None
