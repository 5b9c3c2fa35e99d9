import re
import shlex

import pytest

import lorabook as lb
from lorabook.training.flags import parse

FOLDERS = sorted(path for path in lb.bundled("adapters").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_folder_holds_one_file_that_loads_by_its_name(folder, pipe):
    assert len(list(folder.glob("*.safetensors"))) == 1
    report = lb.load_adapter(pipe, folder.name)
    assert report.name == folder.name and report.base_model == "tiny-sd"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_the_command_on_the_card_is_one_that_training_takes(folder):
    card = (folder / "README.md").read_text()
    method, command = re.search(
        r"accelerate launch --quiet -m lorabook.training.(\w+) (.*)", card
    ).groups()
    kind = {"text_to_image": lb.TextToImageConfig, "dreambooth": lb.DreamBoothConfig}[method]
    config = parse(kind, shlex.split(command))
    source = config.dataset_name if method == "text_to_image" else config.instance_data_dir
    assert config.pretrained_model_name_or_path == "tiny-sd" and lb.bundled(source)


def test_there_is_one_a_style_and_their_ranks_differ(pipe):
    ranks = {name: lb.load_adapter(pipe, name).rank for name in ("creatures", "ink", "mosaic")}
    assert len(set(ranks.values())) == 3


@pytest.mark.parametrize("name", ["creatures", "ink", "mosaic"])
def test_an_adapter_brings_its_pictures_nearer_to_its_set(pipe, name):
    lb.load_adapter(pipe, name)
    images = lb.load_captioned_images(name)
    grid = lb.sweep(pipe, columns={name: [0, 1]}, rows={"prompt": images[:4]["text"]})
    without, with_style = (
        lb.image_similarity(list(column), images[:40]["image"], model="tiny-clip").mean()
        for column in zip(*grid.images, strict=True)
    )
    assert with_style > without


def test_creatures_come_with_the_scale(pipe):
    lb.load_adapter(pipe, "creatures")
    grid = lb.sweep(
        pipe,
        "a cartoon red creature with horns",
        columns={"creatures": [0, 1]},
        rows={"seed": [1, 2, 3]},
    )
    texts = [
        "a cartoon red creature with horns",
        *(f"a red {kind}" for kind in ("mushroom", "dog", "cat", "ball")),
    ]
    without, with_style = (list(column) for column in zip(*grid.images, strict=True))
    assert lb.prompt_similarity(with_style, texts, model="tiny-clip").argmax(1).tolist() == [
        0,
        0,
        0,
    ]
    fit = [
        lb.prompt_similarity(images, texts[:1], model="tiny-clip").mean()
        for images in (without, with_style)
    ]
    assert fit[1] > fit[0] + 0.05


@pytest.mark.parametrize(("name", "kind"), [("patch_cat", "cat"), ("striped_boat", "boat")])
def test_a_subject_comes_with_its_words_in_a_place_it_was_not_seen_in(pipe, name, kind):
    lb.load_adapter(pipe, name)
    subject = lb.load_instance_images(f"subjects/{name}")["image"]
    grid = lb.sweep(
        pipe,
        f"a drawing of sks {kind} on a sandy beach",
        columns={name: [0, 1]},
        rows={"seed": [0, 1, 2, 3]},
    )
    without, with_subject = (
        lb.image_similarity(list(column), subject, model="tiny-clip").mean()
        for column in zip(*grid.images, strict=True)
    )
    assert with_subject > without + 0.2


def test_prior_preservation_keeps_the_class_what_it_was(pipe):
    subject, drawn = lb.load_instance_images("subjects/patch_cat")["image"], {}
    for name in ("patch_cat", "patch_cat_no_prior"):
        lb.load_adapter(pipe, name)
        grid = lb.sweep(
            pipe, "a drawing of a cat", columns={name: [0, 1]}, rows={"seed": list(range(6))}
        )
        drawn["base"], drawn[name] = (
            lb.image_similarity(list(column), subject, model="tiny-clip").mean().item()
            for column in zip(*grid.images, strict=True)
        )
        lb.set_scales(pipe, {name: 0})
    assert abs(drawn["patch_cat"] - drawn["base"]) < drawn["patch_cat_no_prior"] - drawn["base"]


def test_one_subject_has_a_trained_text_encoder(pipe):
    parts = {
        name: set(lb.load_adapter(pipe, name).layers) for name in ("patch_cat", "striped_boat")
    }
    assert parts == {"patch_cat": {"unet", "text_encoder"}, "striped_boat": {"unet"}}
