"""Pictures in memory, in whatever form libraries have them."""

import itertools

import datasets
import numpy as np
import pandas
import pytest
import torch

import lorabook as lb


@pytest.fixture
def rows(picture):
    return [{"image": picture("red"), "text": "A"}, {"image": picture("blue"), "text": "B"}]


class Pairs(torch.utils.data.Dataset):
    """A map-style data set that never raises IndexError, as iter() would need."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number % len(self.rows)]
        return row["image"], row["text"]


FORMS = {
    "dictionaries": lambda rows: rows,
    "pairs": lambda rows: [(row["image"], row["text"]) for row in rows],
    "a generator": lambda rows: (row for row in rows),
    "torch's data set": Pairs,
    "a DataFrame": pandas.DataFrame,
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "a stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "a generator's stream": lambda rows: datasets.IterableDataset.from_generator(
        lambda: iter(rows)
    ),
    "arrays": lambda rows: [
        {"image": np.asarray(row["image"]), "text": row["text"]} for row in rows
    ],
    "tensors": lambda rows: [
        {
            "pixel_values": torch.tensor(np.array(row["image"])).permute(2, 0, 1) / 255,
            "text": row["text"],
        }
        for row in rows
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_form_give_the_same_pictures_and_captions(rows, silent, form):
    images = lb.load_captioned_images(FORMS[form](rows))
    assert list(images["text"]) == ["A", "B"]
    assert [image.getpixel((3, 3)) for image in images["image"]] == [(255, 0, 0), (0, 0, 255)]


def test_a_list_of_pictures_serves_for_a_subject_and_has_no_captions(rows, silent):
    pictures = [row["image"] for row in rows]
    assert list(lb.load_instance_images(pictures, "sks")["text"]) == ["sks", "sks"]
    with pytest.raises(ValueError, match="none of the 2 images in what was given has a caption"):
        lb.load_captioned_images(pictures, allow_empty_captions=False)


def test_files_are_read_with_the_text_beside_each(tmp_path, picture, silent):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("A")
    assert list(lb.load_captioned_images([tmp_path / "a.png"])["text"]) == ["A"]
    named = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "text": ["B"]})
    assert list(lb.load_captioned_images(named)["text"]) == ["B"]


def test_of_a_stream_only_what_is_asked_for_is_taken(rows):
    assert len(lb.load_captioned_images(itertools.cycle(rows), max_samples=3)) == 3


def test_a_stream_without_an_end_is_refused(picture, monkeypatch):
    monkeypatch.setattr("lorabook.images.rows.LONGEST_STREAM", 3)
    with pytest.raises(ValueError, match="more than 3 rows, perhaps no end"):
        lb.load_instance_images(itertools.repeat(picture()))


def test_a_dictionary_of_splits_lists_them(rows):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    for given in (
        splits,
        datasets.IterableDatasetDict({"train": splits["train"].to_iterable_dataset()}),
    ):
        with pytest.raises(ValueError, match="pass one of its splits: train"):
            lb.load_captioned_images(given)


def test_a_saved_data_set_is_read_from_its_folder(rows, tmp_path):
    lb.load_captioned_images(rows).save_to_disk(tmp_path / "saved")
    assert list(lb.load_captioned_images(tmp_path / "saved")["text"]) == ["A", "B"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "cannot be read from int"),
        ([], "is empty"),
        ([{"text": "a"}], "row 0 has no picture; it has: text"),
        ({"image": 3}, "a list for each column"),
        ([torch.full((3, 8, 8), -1.0)], "numbers from -1 to -1; give 0 to 1"),
        ([torch.zeros(2, 3, 8, 8)], "row 0.*not a picture: float32 of shape"),
        ([None], "row 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no caption")
def test_what_holds_no_pictures_is_refused_in_a_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        lb.load_captioned_images(given)


def test_a_damaged_picture_among_rows_is_named(rows):
    with pytest.warns(UserWarning, match="1 image.*row 0"):
        assert list(lb.load_captioned_images([{"image": b"junk", "text": "x"}, *rows])["text"]) == [
            "A",
            "B",
        ]
