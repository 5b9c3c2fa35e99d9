"""Each notebook as it goes where there is a GPU: on a folder shaped like SD 1.5 and a data set
shaped like Pokémon.
"""

import ast
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
from hub_world import hub_world
from run_notebook import run_in_the_hub_world

from lorabook.worlds import BUNDLED, HUB

HERE = Path(__file__).parent
PATHS = sorted((HERE.parents[1] / "notebooks").glob("*.ipynb"))
FEWER = {
    "02": "trial_steps = 3",
    "04": "num_class_images = 4",
    "07": "rounds, repeats = 2, 2",
}  # the rest as it stands
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Fields of HUB for what needs a Hub or a GPU; neither is asked for."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "agg",
            "IPYTHONDIR": str(folder / "ipython"),
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        yield hub_world(folder)


def cells_of(path: Path) -> tuple[str, list[str]]:
    """A notebook's parameters, and its code after them."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    number = next(
        i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])
    )
    return cells[number].source, [cell.source for cell in cells[number + 1 :]]


def names_in(source: str, how: type) -> set[str]:
    """The names that code reads (ast.Load) or sets (ast.Store)."""
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, how)
    }


# 01 is the same in both worlds: it asks for the bundled one by name
@pytest.mark.parametrize(
    "path", [path for path in PATHS if path.stem[:2] != "01"], ids=lambda path: path.stem
)
def test_a_notebook_runs_to_its_end_in_the_world_with_a_gpu(path, hub, tmp_path):
    assert run_in_the_hub_world(path, hub, FEWER.get(path.stem[:2], ""), tmp_path) is None


@each
def test_each_parameter_is_read(path):
    parameters, cells = cells_of(path)
    read = set().union(*(names_in(cell, ast.Load) for cell in cells))
    assert names_in(parameters, ast.Store) - {"world", "as_told"} <= read


def test_some_notebook_reads_each_field_in_which_the_worlds_differ():
    differ = {field for field, value in asdict(HUB).items() if value != getattr(BUNDLED, field)}
    parts = [node for path in PATHS for node in ast.walk(ast.parse(cells_of(path)[0]))]
    read = {
        node.attr
        for node in parts
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "world"
    }
    assert differ - {"name"} <= read


def test_what_stands_in_for_the_hub_changes_no_other_field(hub):
    folders = {
        "model",
        "data",
        "judge",
        "adapter",
        "style",
        "pet",
        "thing",
        "second_style",
        "subject",
    }
    fewer = {"num_inference_steps", "max_train_steps", "subject_train_steps", "validation_split"}
    assert set(hub) == folders | fewer | {"resolution", "mixed_precision"}
    assert all(Path(hub[field]).is_dir() for field in folders)
