"""What lorabook needs against what is installed, and the mending of a hosted notebook: the setup cell calls `mend`.

It runs before anything else is there, so it uses the standard library and pip's own packaging, and no other room.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
KEPT = (
    "torch",
    "numpy",
)  # builds for this very machine: another may not fit its GPU, or what was built against them
TORCHAO_FLOOR = "0.16.0"  # peft.import_utils.TORCHAO_MINIMUM_VERSION: beside an older one peft refuses every LoRA


@dataclass(frozen=True)
class Misfit:
    """A requirement that is not met: whose it is, and the version that is there, None where there is none."""

    whose: str
    requirement: Requirement
    version: str | None

    def __str__(self):
        there = f"there is {self.version}" if self.version else "it is not there"
        return f"{self.whose} needs {_spelled(self.requirement)} and {there}"


def requirements() -> list[Requirement]:
    """What lorabook needs: by pyproject.toml in the repository, else by the installed package."""
    import tomllib  # new in Python 3.11, and `doctor` also tells an older one what it needs

    project = ROOT / "pyproject.toml"
    if project.is_file():
        return [
            Requirement(line)
            for line in tomllib.loads(project.read_text())["project"]["dependencies"]
        ]
    return needs_of("lorabook")


def needs_of(package: str) -> list[Requirement]:
    """What an installed package needs here, without its extras; nothing where it is not installed."""
    try:
        lines = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        return []
    return [
        need
        for need in map(Requirement, lines)
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def misfits(needed: Requirement) -> list[Misfit]:
    """Where lorabook's need of a package, or one of that package's own needs, is not met; [] where all is well."""
    needs = [] if needed.name in KEPT else [(needed.name, need) for need in needs_of(needed.name)]
    found = [
        Misfit(whose, need, version_of(need.name)) for whose, need in [("lorabook", needed), *needs]
    ]
    return [
        misfit
        for misfit in found
        if not misfit.version
        or not misfit.requirement.specifier.contains(misfit.version, prereleases=True)
    ]


def bad_torchao() -> str | None:
    """Why peft can make no LoRA beside the torchao that is there, None where it can.

    It is tried in a process of its own: one that was built for another torch may end the process that imports it.
    """
    version = version_of("torchao")
    if version and Version(version) < Version(TORCHAO_FLOOR):
        return f"{version} is too old for peft, which refuses every LoRA beside it"
    if not version or not importlib.util.find_spec("torchao"):
        return None
    tried = subprocess.run(
        [sys.executable, "-c", "import torchao.quantization, torchao.utils"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if not tried.returncode:
        return None
    why = (tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"])[-1]
    return f"{version} cannot be imported, so peft makes no LoRA beside it: {why[:160]}"


def mend() -> None:
    """Install what is missing or wrong, remove a torchao that peft refuses or cannot import, and say so.

    torch and numpy stay as they are. Where all is well it does nothing. Where a package was replaced whose old modules are
    loaded, it restarts the kernel.

    Raises: RuntimeError if torch or numpy do not fit, or pip cannot install what is needed; SystemExit at a restart.
    """
    _reach_commands()
    needed = requirements()
    for kept in (misfit for need in needed if need.name in KEPT for misfit in misfits(need)):
        raise RuntimeError(
            f"{kept}; it is left as it came with this machine, so choose a newer runtime or environment"
        )
    wrong, torchao = [misfit for need in needed for misfit in misfits(need)], bad_torchao()
    if not wrong and not torchao:
        return
    before, loaded = _installed(), _loaded()
    if torchao:
        _pip("uninstall", "-y", "torchao")
    if wrong:
        _install(needed)
    after = _installed()
    changed = {name for name in before if before[name] != after.get(name)}
    told = _told(before, after, {canonicalize_name(need.name) for need in needed})
    if changed & loaded:
        _restart(
            f"{told}; {_listed(changed & loaded)} had been loaded before, so the kernel restarts: "
            "run the notebook again from its top"
        )
    print(told)


def _reach_commands() -> None:
    """Let the commands that a notebook starts find the package too."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if version_of("lorabook") is None and str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])


def _install(needed: list[Requirement]) -> None:
    """Install the requirements together, so that pip finds versions that also suit each other."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "kept.txt"
        pins.write_text("".join(f"{name}=={version_of(name)}\n" for name in KEPT))
        _pip(
            "install",
            "-c",
            str(pins),
            *(_spelled(need) for need in needed if need.name not in KEPT),
        )
    for misfit in (misfit for need in needed for misfit in misfits(need)):
        raise RuntimeError(
            f"pip came to an end, but {misfit}; restart the kernel and run this cell again"
        )


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
    )
    importlib.invalidate_caches()
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            "it gave no reason"
        ]
        raise RuntimeError(
            f"pip {arguments[0]} failed: {said[-1][:200]}; look whether this machine has internet "
            "(on Kaggle it is switched on in the notebook's settings)"
        )


def _installed() -> dict[str, str]:
    """The installed versions by canonical name; of two copies the one that is imported."""
    found = [
        (canonicalize_name(each.name), each.version)
        for each in metadata.distributions()
        if each.name
    ]
    return dict(reversed(found))


def _loaded() -> set[str]:
    """The packages of which a module has been imported, by canonical name; private ones, such as start-up hooks, aside."""
    homes = metadata.packages_distributions()
    loaded = [module for module in homes if module in sys.modules and not module.startswith("_")]
    return {canonicalize_name(package) for module in loaded for package in homes[module]}


def _told(before: dict[str, str], after: dict[str, str], needed: set[str]) -> str:
    """What was done, with the names of what lorabook itself needs, and the number of what those need in turn."""
    new = {name for name, version in after.items() if before.get(name) != version}
    named = [f"{name} {after[name]}" for name in new & needed] or sorted(new)
    more = f" and {len(new) - len(named)} more" * (len(new) > len(named))
    gone = [f"{name} {version}" for name, version in before.items() if name not in after]
    done = [f"installed {_listed(named)}{more}"] * bool(new) + [f"removed {_listed(gone)}"] * bool(
        gone
    )
    return f"lorabook: {'; '.join(done)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _spelled(requirement: Requirement) -> str:
    """A requirement as pip takes it, without the marker that has done its work."""
    return f"{requirement.name}{requirement.specifier}"


def _restart(told: str) -> None:
    """Restart the kernel; the exception shows the sentence, and keeps the cells below from running in the old one."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if kernel := getattr(shell, "kernel", None):
        kernel.do_shutdown(restart=True)
    raise SystemExit(told)
