import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lorabook"
FLOORS = [{"worlds", "blocks", "captions", "quiet", "lowrank", "bootstrap", "places", "terms", "mime", "whole"},
          {"pipelines", "images", "grid", "plots", "metrics"}, {"block_plot"}, {"adapters"}, {"sweeps", "hub"},
          {"comparisons", "checkup"}, {"training", "studio"}, {"__main__", "__init__"}]
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(path: Path) -> set[str]:
    tree, rooms = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lorabook."):
            rooms.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lorabook.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_floors_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported_rooms(path) - {room}:
        assert floor_of(other) < floor_of(room), f"{room} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_is_small(path):
    assert len(path.read_text().splitlines()) <= 250


def test_public_functions_and_classes_have_docstrings():
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
