import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RANGES = PROJECT["dependencies"] + EXTRAS["notebooks"] + EXTRAS["trackers"] + EXTRAS["dev"]


def pinned(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_environment_yml_has_the_ranges_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[0] == f"python{PROJECT['requires-python']}"
    assert conda[-1]["pip"] == [*RANGES, "-e ."]


def test_constraints_pin_every_requirement_within_its_range():
    versions = pinned()
    for requirement in map(Requirement, RANGES):
        assert requirement.name in versions, requirement.name
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_the_lowest_environment_has_the_lowest_version_of_every_range():
    versions = pinned("constraints-lowest.txt")
    for requirement in map(Requirement, RANGES):
        floor = str(requirement.specifier).removeprefix(">=")
        assert Version(versions[requirement.name]) == Version(floor), requirement


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_torch_is_pinned_to_a_plain_version_that_make_can_ask_a_cpu_build_of(file):
    assert re.fullmatch(r"\d+\.\d+\.\d+", pinned(file)["torch"])


def test_importing_lorabook_takes_under_half_a_second():
    code = "import time; t = time.perf_counter(); import lorabook; print(time.perf_counter() - t)"
    assert float(subprocess.check_output([sys.executable, "-c", code])) < 0.5


def test_every_public_name_is_there():
    import lorabook as lb

    assert all(getattr(lb, name) is not None for name in lb.__all__)


def test_readme_names_the_commands_that_make_knows():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in re.findall(r"make (demo|test|lab|bench)\b", (ROOT / "README.md").read_text()):
        assert command in targets
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci/run").read_text()
