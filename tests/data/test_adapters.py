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


@pytest.mark.parametrize("name", ["creatures", "ink", "mosaic"])
def test_an_adapter_brings_its_pictures_nearer_to_its_set(pipe, name):
    lb.load_adapter(pipe, name)
    images = lb.load_captioned_images(name)
    grid = lb.sweep(pipe, columns={name: [0, 1]}, rows={"prompt": images[:4]["text"]})
    without, with_style = (lb.image_similarity(list(column), images[:40]["image"], model="tiny-clip").mean()
                           for column in zip(*grid.images, strict=True))
    assert with_style > without


def test_creatures_come_with_the_scale(pipe):
    lb.load_adapter(pipe, "creatures")
    grid = lb.sweep(pipe, "a cartoon red creature with horns", columns={"creatures": [0, 1]}, rows={"seed": [1, 2, 3]})
    texts = ["a cartoon red creature with horns", *(f"a red {kind}" for kind in ("mushroom", "dog", "cat", "ball"))]
    without, with_style = (list(column) for column in zip(*grid.images, strict=True))
    assert closest_prompt(with_style, texts, model="tiny-clip") == [0, 0, 0]
    fit = [lb.prompt_similarity(images, texts[:1], model="tiny-clip").mean() for images in (without, with_style)]
    assert fit[1] > fit[0] + 0.05
