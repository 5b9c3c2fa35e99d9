"""Every form × {load, the picture its writer draws, save in each form, load again with the same
ΔW}, on two models.
"""

import re
from pathlib import Path

import pytest

import lorabook as lb
from adapter_files import WRITERS, WRITTEN_HERE, draw, plain
from conftest import tiny_sdxl
from lorabook.live.match import base_weights
from lorabook.lora.formats.write import FORMATS
from lorabook.lora.source import read_source


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return {
        "tiny-sd": str(lb.bundled("tiny-sd")),
        "tiny SDXL": tiny_sdxl(tmp_path_factory.mktemp("xl")),
    }


@pytest.fixture(scope="module", params=["tiny-sd", "tiny SDXL"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module", params=WRITTEN_HERE)
def written(request, model, tmp_path_factory):
    """A file of a form, the picture of its writer, and the base picture."""
    folder, pipe = tmp_path_factory.mktemp("written"), plain(model)
    base = draw(pipe)
    path = WRITERS[request.param](pipe, folder)
    return path, draw(pipe), base


def deltas(pipe, adapter) -> dict:
    bases = base_weights(pipe, adapter)
    return {
        (part, module): layer.delta(bases[part][module])
        for part, layers in adapter.layers.items()
        for module, layer in layers.items()
    }


def off(pipe, expected) -> float:
    """The largest difference of the picture that is drawn, as a share of the picture's range."""
    return (draw(pipe) - expected).abs().max().item()


def test_it_loads_and_draws_its_writers_picture(written, model):
    path, expected, base = written
    pipe = plain(model)
    assert off(pipe, expected) > 0.02
    report = lb.load_adapter(pipe, path, "it")
    assert off(pipe, expected) < 1e-3
    assert all(
        key.endswith(".diff_b") for key in report.ignored
    )  # differences of biases, zero in this file
    lb.set_scales(pipe, {"it": 0})
    assert off(pipe, base) == 0


def test_saved_in_each_form_and_loaded_again_it_has_the_same_delta(written, model, tmp_path):
    pipe = plain(model)
    lb.load_adapter(pipe, written[0], "it")
    expected = deltas(pipe, read_source(written[0]).adapter)
    for form in FORMATS:
        lb.save_adapter(pipe, tmp_path / form, form)
        found = deltas(pipe, read_source(tmp_path / form).adapter)
        assert found.keys() == expected.keys()
        worst = max(
            ((found[place] - delta).norm() / delta.norm()).item()
            for place, delta in expected.items()
        )
        assert worst < 1e-5, form


def test_what_is_saved_for_diffusers_draws_the_same_picture_there(written, model, tmp_path):
    path, expected, _ = written
    pipe, other = plain(model), plain(model)
    lb.load_adapter(pipe, path, "it")
    lb.save_adapter(pipe, tmp_path / "saved")
    other.load_lora_weights(tmp_path / "saved")
    assert off(other, expected) < 1e-3


def test_the_table_in_the_docs_has_a_row_for_each_form():
    page = (Path(__file__).parents[2] / "docs/adapters.md").read_text()
    assert re.findall(r"^\| ([^|]+) \| ✓ \| ✓ \| ✓ \| ✓ \| ✓ \|$", page, re.M) == list(WRITERS)
