import datasets
import pytest
import torch
from PIL import Image

from lorabook.training.cache import Store, cache_folder, images_hash, key_of


class Counting:
    """Rows that know how often they were computed, and can be cut short."""

    def __init__(self, stop_at=None):
        self.asked, self.stop_at = [], stop_at

    def __call__(self, start, stop):
        if self.stop_at is not None and start >= self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        return torch.arange(start, stop).float()[:, None] * torch.ones(3)


def make(folder, compute, count=10, key="rows"):
    return Store(folder, key, count, 4, compute, label="", progress=False)


def test_rows_come_back_as_they_were_computed(tmp_path):
    store = make(tmp_path, Counting())
    assert torch.equal(
        store[torch.tensor([9, 0, 9])], torch.tensor([[9.0] * 3, [0.0] * 3, [9.0] * 3])
    )


def test_what_is_there_is_not_computed_again(tmp_path):
    make(tmp_path, Counting())
    again = Counting()
    assert (
        torch.equal(make(tmp_path, again)[torch.tensor([5])], torch.full((1, 3), 5.0))
        and not again.asked
    )


def test_a_store_cut_short_is_finished_at_the_same_borders(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Counting(stop_at=4))
    rest = Counting()
    store = make(tmp_path, rest)
    assert rest.asked == [(4, 8), (8, 10)] and torch.equal(
        store[torch.arange(10)][:, 0], torch.arange(10.0)
    )


def test_a_damaged_chunk_is_computed_anew(tmp_path):
    make(tmp_path, Counting())
    with open(tmp_path / "rows/rows.bin", "r+b") as file:
        file.seek(5 * 12)
        file.write(b"\xff\xff\xff\xff")
    again = Counting()
    store = make(tmp_path, again)
    assert again.asked == [(4, 8)] and store[torch.tensor([5])][0, 0] == 5


@pytest.mark.parametrize("name", ["about.json", "done.txt", "rows.bin"])
@pytest.mark.parametrize("content", [b"", b"{\x00", None])
def test_files_that_are_not_understood_are_rebuilt(tmp_path, name, content):
    make(tmp_path, Counting())
    path = tmp_path / "rows" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert torch.equal(make(tmp_path, Counting())[torch.arange(10)][:, 0], torch.arange(10.0))


def test_the_key_knows_weights_texts_and_order():
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    keys = [
        key_of(*parts)
        for parts in (("a", layer), ("a", other), ("b", layer), (layer, "a"), ("a", layer, 1))
    ]
    assert len(set(keys)) == 5 and key_of("a", layer) == keys[0]


def test_images_are_known_by_their_content(tmp_path):
    def stored(color):
        Image.new("RGB", (4, 4), color).save(tmp_path / "a.png")
        return datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column(
            "image", datasets.Image()
        )

    red, blue = images_hash(stored("red")), images_hash(stored("blue"))
    assert red != blue and images_hash(stored("red")) == red


def test_the_folder_is_below_the_cache_that_was_named(tmp_path):
    assert (
        cache_folder(str(tmp_path)) == tmp_path / "lorabook-arrays"
        and cache_folder().name == "arrays"
    )
