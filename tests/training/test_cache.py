import datasets
import pytest
import torch
from PIL import Image

from lorabook.training.cache import cache_folder, encode_once, fingerprint, images_hash


def encoded(path, asked=None, stop_at=None):
    """Ten rows of three equal numbers, and ten numbers; `asked` gets the rows that were encoded."""

    def encode(rows):
        if stop_at in rows:
            raise KeyboardInterrupt
        if asked is not None:
            asked.extend(rows)
        numbers = torch.tensor(rows).float()
        return numbers[:, None, None] * torch.ones(3, 2), numbers.bfloat16()

    rows = datasets.Dataset.from_dict({"row": range(10)})
    return encode_once("rows", rows, encode, path, 4)


def test_rows_come_back_in_their_shape_and_order(tmp_path):
    rows, numbers = encoded(tmp_path / "new/x.arrow")
    picked = rows[torch.tensor([9, 0, 9])]
    assert picked.shape == (3, 3, 2) and picked[:, 0, 0].tolist() == [9, 0, 9]
    assert numbers[torch.arange(10)].tolist() == list(range(10))


def test_what_is_there_is_not_encoded_again(tmp_path):
    again = []
    encoded(tmp_path / "x.arrow")
    rows, _ = encoded(tmp_path / "x.arrow", again)
    assert not again and rows[torch.tensor([5])][0, 0, 0] == 5


def test_encoding_that_was_cut_short_leaves_nothing_half_done(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="^$"):
        encoded(tmp_path / "x.arrow", stop_at=7)
    assert not list(tmp_path.iterdir())
    assert len(encoded(tmp_path / "x.arrow")[0].rows) == 10


@pytest.mark.parametrize("content", [b"", b"{\x00", 300])
def test_a_file_that_cannot_be_read_is_written_anew(tmp_path, content):
    encoded(tmp_path / "x.arrow")
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content if isinstance(content, bytes) else whole[:content])
    assert encoded(tmp_path / "x.arrow")[1][torch.arange(10)].tolist() == list(range(10))


def test_the_fingerprint_knows_weights_texts_and_order():
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    values = [("a", layer), ("a", other), ("b", layer), (layer, "a"), ("a", layer, 1)]
    assert len({fingerprint(*value) for value in values}) == 5
    assert fingerprint("a", layer) == fingerprint("a", layer)


def test_images_are_known_by_their_content(tmp_path):
    def stored(color):
        Image.new("RGB", (4, 4), color).save(tmp_path / "a.png")
        rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
        return rows.cast_column("image", datasets.Image())

    red, blue = images_hash(stored("red")), images_hash(stored("blue"))
    assert red != blue and images_hash(stored("red")) == red


def test_the_folder_is_below_the_cache_that_was_named(tmp_path):
    assert cache_folder(str(tmp_path)) == tmp_path / "lorabook-arrays"
    assert cache_folder().name == "arrays"
