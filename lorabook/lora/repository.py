"""Files that lie beside each other where an adapter is: in a folder here, or in a repository on the Hub."""

import re
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

SECONDS = 10  # for the Hub to say what a repository holds
_HUB_FILE = re.compile(
    r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/(refs/(?:pr|convert)/[^/]+|[^/]+)/(.+)"
)


class Folder:
    """The files of a folder on this machine."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self):
        return str(self.path)

    def list(self, inside: str = "") -> list[str]:
        """The names of the files in it, or in the folder `inside` it; not of those further down."""
        folder = self.path / inside
        return (
            sorted(file.name for file in folder.iterdir() if file.is_file())
            if folder.is_dir()
            else []
        )

    def get(self, name: str) -> Path | None:
        """The file of this name, with folders or without; None where there is none."""
        return self.path / name if (self.path / name).is_file() else None


class Repository:
    """The files of a repository on the Hub, or of its cached copy where the Hub is out of reach.

    The Hub is asked once and with a time limit for all that there is; its client alone would try each file for half a
    minute.

    Args:
        repo_id: "owner/name".
        kept_first: take a file from the cache where it is there, without asking whether it has changed.
        revision, token, cache_dir, local_files_only: as in `from_pretrained`.
    Raises: FileNotFoundError, from `list` and `get`, if the Hub does not give it and the cache does not have it.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        kept_first: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache_dir=None,
        local_files_only: bool = False,
    ):
        self.repo_id, self.kept_first = repo_id, kept_first
        self.hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }

    def __str__(self):
        return self.repo_id

    @cached_property
    def names(self) -> frozenset[str]:
        """All its files, with their folders."""
        try:
            if self.hub["local_files_only"]:
                raise ConnectionError("local_files_only was given, and the cache does not have it")
            info = HfApi(token=self.hub["token"]).model_info(
                self.repo_id, revision=self.hub["revision"], timeout=SECONDS
            )
            return frozenset(file.rfilename for file in info.siblings or ())
        except (
            Exception
        ) as error:  # no network: the class is that of whichever HTTP library huggingface_hub uses
            self.hub["local_files_only"] = True
            try:
                folder = Path(snapshot_download(self.repo_id, **self.hub))
            except Exception:
                raise self._not_given(error) from None
            return frozenset(
                file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
            )

    def list(self, inside: str = "") -> list[str]:
        """As `Folder.list`."""
        below = f"{inside.strip('/')}/" if inside.strip("/") else ""
        names = (name.removeprefix(below) for name in self.names if name.startswith(below))
        return sorted(name for name in names if "/" not in name)

    def get(self, name: str) -> Path | None:
        """As `Folder.get`; it is downloaded where need be."""
        if self.kept_first:
            place = {"cache_dir": self.hub["cache_dir"], "revision": self.hub["revision"]}
            if isinstance(kept := try_to_load_from_cache(self.repo_id, name, **place), str):
                return Path(kept)
        if name not in self.names:
            return None
        try:
            return Path(hf_hub_download(self.repo_id, name, **self.hub))
        except Exception as error:
            raise self._not_given(error, f"{name} of {self.repo_id}") from None

    def _not_given(self, error: Exception, what: str | None = None) -> FileNotFoundError:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        what = what or f"adapter {self.repo_id!r}"
        return FileNotFoundError(f"{what} not found: the Hub did not give it: {reason}")


def hub_file(url: str) -> dict[str, str] | None:
    """What the address of a file on the Hub asks for, be it of the file or of its page; None for other sites."""
    parts = urlsplit(url)
    found = _HUB_FILE.fullmatch(parts.path)
    if not found or parts.netloc not in (
        "huggingface.co",
        "hf.co",
        urlsplit(constants.ENDPOINT).netloc,
    ):
        return None
    return {"repo_id": found[1], "revision": unquote(found[2]), "filename": unquote(found[3])}
