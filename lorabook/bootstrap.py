"""What lorabook needs against what is installed; `mend` in a notebook's setup cell installs it.

It runs before anything else is there, so it uses the standard library and pip's own packaging only.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
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
# Builds for this very machine: another may not fit its GPU, or what was built against them.
KEPT = ("torch", "numpy")
TORCHAO_FLOOR = "0.16.0"  # beside an older one peft refuses every LoRA


@dataclass(frozen=True)
class Misfit:
    """A requirement that is not met: whose it is, and the version that is there, or None."""

    whose: str
    requirement: Requirement
    version: str | None

    @property
    def is_met(self) -> bool:
        """Whether the version that is there is one that is wanted, so that nothing is amiss."""
        return bool(self.version) and self.requirement.specifier.contains(
            self.version, prereleases=True
        )

    def __str__(self):
        there = f"there is {self.version}" if self.version else "it is not there"
        return f"{self.whose} needs {self.requirement.name}{self.requirement.specifier} and {there}"


def requirements() -> list[Requirement]:
    """What lorabook needs: by pyproject.toml in the repository, else by the installed package."""
    import tomllib  # new in Python 3.11, and `doctor` also tells an older one what it needs

    project = ROOT / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
        return [Requirement(line) for line in lines]
    return needs_of("lorabook")


def needs_of(package: str) -> list[Requirement]:
    """What an installed package needs here, without its extras; [] where it is not installed."""
    try:
        lines = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        return []
    needs = map(Requirement, lines)
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def misfits(needed: Requirement) -> list[Misfit]:
    """Which of lorabook's needs of a package, and of that package's own needs, are not met."""
    needs = [] if needed.name in KEPT else [(needed.name, need) for need in needs_of(needed.name)]
    candidates = [
        Misfit(whose, need, version_of(need.name)) for whose, need in [("lorabook", needed), *needs]
    ]
    return [misfit for misfit in candidates if not misfit.is_met]


def bad_torchao() -> str | None:
    """Why peft can make no LoRA beside the torchao that is there, None where it can.

    It is imported in another process: one that was built for another torch may end its process.
    """
    version = version_of("torchao")
    if version and Version(version) < Version(TORCHAO_FLOOR):
        return f"{version} is too old for peft, which refuses every LoRA beside it"
    if not version or not importlib.util.find_spec("torchao"):
        return None
    process = subprocess.run(
        [sys.executable, "-c", "import torchao.quantization, torchao.utils"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if not process.returncode:
        return None
    reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    return f"{version} cannot be imported, so peft makes no LoRA beside it: {reason[:160]}"


def mend() -> None:
    """Install what is missing or wrong, remove a torchao that peft refuses, and say so.

    torch and numpy stay as they are. Where all is well nothing happens. Where a package was
    replaced whose old modules are loaded, the kernel restarts.

    Raises:
        RuntimeError: if torch or numpy do not fit, or pip cannot install what is needed.
        SystemExit: at a restart.
    """
    _reach_commands()
    needed = requirements()
    wrong = [misfit for need in needed for misfit in misfits(need)]
    own = [misfit for misfit in wrong if misfit.whose == "lorabook"]
    for misfit in (misfit for misfit in own if misfit.requirement.name in KEPT):
        raise RuntimeError(
            f"{misfit}; it is left as it came with this machine, so choose a newer runtime "
            "or environment"
        )
    torchao = bad_torchao()
    if not wrong and not torchao:
        return
    before, loaded = _installed(), _loaded()
    if torchao:
        _pip("uninstall", "-y", "torchao")
    if wrong:
        _install(needed)
    after = _installed()
    summary = _summary(before, after, {canonicalize_name(need.name) for need in needed})
    changed = {name for name in before if before[name] != after.get(name)}
    if stale := changed & loaded:
        _restart(
            f"{summary}; {', '.join(sorted(stale))} had been loaded before, so the kernel "
            "restarts: run the notebook again from its top"
        )
    print(summary)


def _reach_commands() -> None:
    """Let the commands that a notebook starts find the package too."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if version_of("lorabook") is None and str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])


def _install(needed: list[Requirement]) -> None:
    """Install the requirements together, so that pip finds versions that also suit each other."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("".join(f"{name}=={version_of(name)}\n" for name in KEPT))
        packages = [f"{need.name}{need.specifier}" for need in needed if need.name not in KEPT]
        _pip("install", "-c", str(pins), *packages)
    for misfit in (misfit for need in needed for misfit in misfits(need)):
        raise RuntimeError(
            f"pip came to an end, but {misfit}; restart the kernel and run this cell again"
        )


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else "it gave no reason"
        raise RuntimeError(
            f"pip {arguments[0]} failed: {reason[:200]}; look whether this machine has internet "
            "(on Kaggle it is switched on in the notebook's settings)"
        )


def _installed() -> dict[str, str]:
    """The installed versions by canonical name; of two copies the one that is imported."""
    pairs = [(canonicalize_name(d.name), d.version) for d in metadata.distributions() if d.name]
    return dict(reversed(pairs))


def _loaded() -> set[str]:
    """The packages of which a module is imported, by canonical name; start-up hooks aside."""
    packages = metadata.packages_distributions()
    modules = [name for name in packages if name in sys.modules and not name.startswith("_")]
    return {canonicalize_name(package) for name in modules for package in packages[name]}


def _summary(before: dict[str, str], after: dict[str, str], needed: set[str]) -> str:
    """What was done, with the names of what lorabook needs, and the number of what those need."""
    new = {name for name, version in after.items() if before.get(name) != version}
    names = sorted(f"{name} {after[name]}" for name in new & needed) or sorted(new)
    more = f" and {len(new) - len(names)} more" if len(new) > len(names) else ""
    gone = sorted(f"{name} {version}" for name, version in before.items() if name not in after)
    parts = [f"installed {', '.join(names)}{more}"] if new else []
    parts += [f"removed {', '.join(gone)}"] if gone else []
    return f"lorabook: {'; '.join(parts)}"


def _restart(reason: str) -> None:
    """Restart the kernel; the exception shows why, and keeps later cells from running."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if kernel := getattr(shell, "kernel", None):
        kernel.do_shutdown(restart=True)
    raise SystemExit(reason)
