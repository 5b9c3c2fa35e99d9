"""The rules of the house, read from its source: docs/how-it-is-built.md says why."""

import ast
import re
from pathlib import Path

import pytest

import lorabook

PACKAGE = Path(__file__).parent.parent / "lorabook"
FLOORS = [
    {"types", "checks", "worlds", "blocks", "lowrank", "bootstrap", "schedulers", "upstream"},
    {"pipelines", "images", "show"},
    {"metrics", "machine"},
    {"lora"},
    {"live"},
    {"sweeps", "hub", "adapters"},
    {"training"},
    {"studio"},
    {"__main__", "__init__"},
]
# The house is to shrink to 9,000 lines (lora and live 3,800, studio 1,400, training 2,000) and 70
# modules. Until then it may not grow: lower these numbers with each step.
LINES = {"lora live": 7515, "studio": 2435, "training": 2740, "": 17667}
MODULES_AT_MOST = 93
BANNED_NAMES = {"told", "said", "found", "made", "kept"}
# Only these touch what other libraries keep to themselves.
# bootstrap.py runs where nothing but pip is installed.
UPSTREAM = {"live/upstream.py", "live/inject.py", "upstream.py", "bootstrap.py"}
PRIVATE = re.compile(
    r"\._(hf_hook|hf_peft_config_loaded|diffusers_hook|execution_device|progress_bar_config|reset_state"
    r"|modules|version|orig_mod|compiled_call_impl)\b|_resolve_dtype|pip\._vendor|_getframe|MethodType"
    r"|\.__class__ ="
)
TUNERS = re.compile(r"^(from|import) (peft\.tuners|peft\.utils\.other)", re.M)
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(path: Path) -> set[str]:
    tree, rooms = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lorabook":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorabook."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            rooms |= {name.split(".")[1] for name in names if name.startswith("lorabook.")}
    return rooms


def names_bound(tree: ast.AST) -> set[str]:
    stores = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return stores | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def every(rule):
    return pytest.mark.parametrize("path", MODULES, ids=name_of)(rule)


@every
def test_a_room_imports_only_from_floors_below(path):
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert floor_of(other) < floor_of(room), f"{room} imports {other}"


@every
def test_an_adapter_as_data_knows_no_layer_and_no_figure(path):
    if room_of(path) == "lora":
        assert not re.search(r"matplotlib|peft\.tuners|diffusers\.pipelines", path.read_text())


@every
def test_a_module_is_small(path):
    assert len(path.read_text().splitlines()) <= 300


@every
def test_a_variable_is_not_named_by_a_participle(path):
    assert not names_bound(ast.parse(path.read_text())) & BANNED_NAMES


@every
def test_what_others_keep_to_themselves_is_touched_in_three_files(path):
    text = path.read_text()
    if name_of(path) not in UPSTREAM:
        assert not PRIVATE.search(text) and not TUNERS.search(text)


@every
def test_public_functions_and_classes_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@every
def test_a_pipeline_is_annotated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not [a.arg for a in arguments if a.arg == "pipe" and a.annotation is None], (
                node.name
            )


@pytest.mark.parametrize("name", lorabook.__all__)
def test_a_public_name_lives_where_it_is_defined(name):
    path = PACKAGE / (lorabook._HOME[name].replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert name in defined | names_bound(tree), f"{name} is not defined in {name_of(path)}"


@pytest.mark.parametrize("rooms", LINES)
def test_the_house_is_thin(rooms):
    paths = [path for path in MODULES if not rooms or room_of(path) in rooms.split()]
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    assert lines <= LINES[rooms], "raise LINES in the commit that needs them, and say why"


def test_the_house_has_few_rooms():
    assert len([path for path in MODULES if path.name != "__init__.py"]) <= MODULES_AT_MOST


@pytest.mark.parametrize(
    "page", sorted(PACKAGE.parent.glob("docs/*.md")), ids=lambda page: page.stem
)
def test_a_page_names_modules_that_exist(page):
    rooms = ("lorabook", "tests", "benchmarks", "data", "docs", ".ci")
    modules = [str(path) for room in rooms for path in (PACKAGE.parent / room).rglob("*.py")]
    named = set(re.findall(r"(?<![\w/.])[\w/]+\.py\b", page.read_text()))
    gone = [name for name in named if not any(path.endswith(f"/{name}") for path in modules)]
    assert not gone
