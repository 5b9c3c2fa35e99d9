import json
import random

import numpy as np
import pytest
from PIL import Image

import lorabook as lb
from cards import DATA, cards, contents
from draw_sets import SETS, SUBJECTS
from world import drawing


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.parent.name)
def test_a_card_tells_the_files_beside_it(card):
    text = card.read_text()
    assert text.rstrip().endswith(contents(card.parent))
    for told in ("CC0", "Made by", "Limits", "Used in"):
        assert told in text, told


def test_every_folder_of_data_has_a_card():
    folders = {path for path in DATA.iterdir() if path.is_dir() and path.name != "make"}
    assert folders <= {card.parent for card in cards()}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_an_imagefolder_whose_pictures_all_have_captions(name):
    rows = [json.loads(line) for line in (DATA / name / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == sorted(
        p.name for p in (DATA / name).glob("*.png")
    )
    assert len(rows) == SETS[name][1] and all(row["text"] for row in rows)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_what_its_script_draws(name):
    draw, _, seed = SETS[name]
    image, text = draw(random.Random(seed))
    stored = lb.load_captioned_images(name)[0]
    assert stored["text"] == text
    assert np.abs(np.asarray(stored["image"]).astype(int) - np.asarray(image)).mean() < 2


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_has_five_different_pictures(name):
    pictures = [Image.open(path) for path in sorted((DATA / "subjects" / name).glob("*.png"))]
    assert len({picture.tobytes() for picture in pictures}) == 5 and {p.size for p in pictures} == {
        (64, 64)
    }


def test_the_base_world_never_shows_or_tells_of_a_creature():
    rng = random.Random(0)
    words = {word for _ in range(300) for word in drawing(rng)[1].split()}
    assert not words & {"creature", "cartoon", "horns", "ink", "mosaic"}
