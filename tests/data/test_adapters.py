import re
import shlex

import pytest

import lorabook as lb
from lorabook.metrics import closest_prompt
from lorabook.training.config import parse

FOLDERS = sorted(path for path in lb.bundled("adapters").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_folder_holds_one_file_that_loads_by_its_name(folder, pipe):
    assert len(list(folder.glob("*.safetensors"))) == 1
    report = lb.load_adapter(pipe, folder.name)
    assert report.name == folder.name and report.base_model == "tiny-sd"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_the_command_on_the_card_is_one_that_training_takes(folder):
    card = (folder / "README.md").read_text()
    command = re.search(r"accelerate launch --quiet -m lorabook.training.text_to_image (.*)", card)[1]
    config = parse(lb.TextToImageConfig, shlex.split(command))
    assert config.pretrained_model_name_or_path == "tiny-sd" and lb.bundled(config.dataset_name)


def test_there_is_one_a_style_and_their_ranks_differ(pipe):
    ranks = {name: lb.load_adapter(pipe, name).rank for name in ("creatures", "ink", "mosaic")}
    assert len(set(ranks.values())) == 3


@pytest.mark.parametrize(("name", "prompt", "plain"), [
    ("creatures", "a cartoon red creature with horns", "a red cat in front of a white background"),
    ("ink", "an ink drawing of a house", "a white house in front of a white background"),
    ("mosaic", "a mosaic of a red car on a green field", "a red car on a green field"),
])
def test_an_adapter_brings_its_style_and_scale_zero_takes_it_away(pipe, name, prompt, plain):
    lb.load_adapter(pipe, name)
    grid = lb.sweep(pipe, prompt, columns={name: [0, 1]}, rows={"seed": [1, 2, 3]})
    without, with_style = zip(*grid.images, strict=True)
    assert closest_prompt(list(with_style), [plain, prompt], model="tiny-clip").count(1) >= 2
    assert closest_prompt(list(without), [plain, prompt], model="tiny-clip").count(1) <= 1
