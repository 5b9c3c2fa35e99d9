import io

import pytest
from PIL import Image

import lorabook as lb


def grid_of(picture, **labels):
    return lb.ImageGrid([[picture("red", (64, 64)), picture("blue", (64, 64))]], **labels)


def test_small_images_are_enlarged_to_be_seen(picture):
    assert min(grid_of(picture).picture().size) > 128


def test_large_images_are_reduced_and_kept_whole_in_images(picture):
    grid = lb.ImageGrid([[picture("red", (1024, 512)), picture("blue", (512, 1024))]])
    assert max(grid.picture().size) < 700 and grid.images[0][0].size == (1024, 512)
    colors = dict((color, count) for count, color in grid.picture().getcolors(1 << 20))
    assert colors[(255, 0, 0)] == colors[(0, 0, 255)] == 320 * 160


def test_labels_take_room_and_leave_the_images_whole(picture):
    plain, labelled = (grid_of(picture, **labels).picture() for labels in
                       ({}, dict(columns=["scale 0", "scale 1"], rows=["a long prompt that must be broken"], title="t")))
    assert labelled.width > plain.width and labelled.height > plain.height
    colors = dict((color, count) for count, color in labelled.getcolors(1 << 20))
    assert colors[(255, 0, 0)] == colors[(0, 0, 255)] == 128 * 128


def test_it_shows_itself_and_is_saved_as_a_png(picture, tmp_path):
    grid = grid_of(picture)
    assert Image.open(io.BytesIO(grid._repr_png_())).format == "PNG"
    assert Image.open(grid.save(tmp_path / "new" / "grid.png")).size == grid.picture().size


def test_labels_that_do_not_fit_are_an_error(picture):
    with pytest.raises(ValueError, match="2 columns was given 1 labels"):
        grid_of(picture, columns=["one"])


def test_an_empty_grid_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        lb.ImageGrid([])


def test_rows_of_unequal_length_are_an_error(picture):
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        lb.ImageGrid([[picture()], [picture(), picture()]])
