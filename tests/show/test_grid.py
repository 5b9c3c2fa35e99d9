import base64
import io
import json

import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image, ImageChops, PngImagePlugin

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
    plain, labelled = (
        grid_of(picture, **labels).picture()
        for labels in (
            {},
            dict(
                columns=["scale 0", "scale 1"],
                rows=["a long prompt that must be broken"],
                title="t",
            ),
        )
    )
    assert labelled.width > plain.width and labelled.height > plain.height
    colors = dict((color, count) for count, color in labelled.getcolors(1 << 20))
    assert colors[(255, 0, 0)] == colors[(0, 0, 255)] == 128 * 128


def test_it_shows_itself_and_is_saved_as_a_png(picture, tmp_path):
    grid = grid_of(picture)
    assert Image.open(io.BytesIO(grid._repr_png_())).format == "PNG"
    assert Image.open(grid.save(tmp_path / "new" / "grid.png")).size == grid.picture().size


def test_a_notebook_gets_the_picture_and_its_content_in_words(picture):
    grid = grid_of(picture, columns=["scale 0", "scale 1"], rows=["a cat"], title="One seed.")
    data, metadata = DisplayFormatter().format(grid)
    assert base64.b64decode(data["image/png"]) == grid._repr_png_()
    assert metadata["image/png"]["alt"] == (
        "Pictures in 1 row and 2 columns, 64 × 64 pixels each: One seed; "
        "columns: scale 0, scale 1; rows: a cat."
    )
    assert "0x" not in data["text/plain"] and "scale 1" in data["text/plain"]


def test_the_words_for_a_large_grid_stay_short(picture):
    labels = [f"a long label of column {number}" for number in range(40)]
    alt = lb.ImageGrid([[None] * 40] * 40, labels, labels, "title " * 50).alt
    assert len(alt) <= 300 and "40 rows" in alt and "column 0" in alt and "…" in alt


def test_labels_are_drawn_with_the_letters_of_mathematics(picture):
    drawn = {
        grid_of(picture, title=letter).picture().tobytes()
        for letter in ("‖", "Δ", "√", "≈", "\U0010fffd")
    }
    assert len(drawn) == 5


@pytest.mark.parametrize("label", ["W" * 30, "a prompt of many words " * 12, "‖ΔW‖\n" * 12])
def test_no_label_is_cut_off(picture, label):
    sheet = lb.ImageGrid([[picture("red", (64, 64))]], [label], [label], label).picture()
    ink = ImageChops.invert(sheet).getbbox()
    assert min(ink[0], ink[1], sheet.width - ink[2], sheet.height - ink[3]) >= 4


def test_a_label_keeps_its_own_lines(picture):
    one, two = (grid_of(picture, title=title).picture() for title in ("a b", "a\nb"))
    assert two.height > one.height


def test_labels_that_do_not_fit_are_an_error(picture):
    with pytest.raises(ValueError, match="2 columns was given 1 labels"):
        grid_of(picture, columns=["one"])


def test_an_empty_grid_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        lb.ImageGrid([])


def test_rows_of_unequal_length_are_an_error(picture):
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        lb.ImageGrid([[picture()], [picture(), picture()]])


def test_the_difference_from_a_column_is_absolute_and_black_where_equal(picture):
    grid = lb.ImageGrid([[picture((10, 20, 30)), picture((40, 10, 30))]], ["base", "ink"])
    differences = grid.difference_from("base")
    assert [image.getpixel((0, 0)) for image in differences.images[0]] == [(0, 0, 0), (30, 10, 0)]
    assert differences.difference_from(1).images[0][0].getpixel((0, 0)) == (30, 10, 0)
    assert "difference from base" in differences.title


@pytest.mark.parametrize("column", ["red", 2, -3, True, None])
def test_a_column_that_is_not_there_is_an_error(picture, column):
    with pytest.raises(ValueError, match="has no column .*it has 2: base, ink"):
        lb.ImageGrid([[picture(), picture()]], ["base", "ink"]).difference_from(column)


def test_images_of_different_sizes_have_no_difference(picture):
    with pytest.raises(ValueError, match="different sizes"):
        lb.ImageGrid([[picture(), picture(size=(9, 9))]]).difference_from(0)


def test_a_gif_shows_the_columns_one_after_another(picture, tmp_path):
    grid = lb.ImageGrid(
        [[picture("red"), picture("blue"), picture("green")]],
        ["a", "b", "c, a longer one for lines"],
    )
    gif = grid.to_gif(tmp_path / "out" / "it.gif", seconds=0.2)
    with Image.open(tmp_path / "out" / "it.gif") as shown:
        assert shown.n_frames == 3 and shown.info["duration"] == 200 and shown.info["loop"] == 0
    data, metadata = gif._repr_mimebundle_()
    assert data["image/gif"] and gif.data.startswith(b"GIF89a")
    assert metadata["image/gif"]["alt"] == gif.alt and "columns: a, b, c" in gif.alt


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (500, 400)])
def test_a_saved_grid_comes_back_with_every_pixel_and_label(tmp_path, size):
    noise = Image.effect_noise(size, 90).convert("RGB")
    grid = lb.ImageGrid(
        [[noise, None], [noise.rotate(180), noise]],
        ["one", "two"],
        ["up", "down"],
        "title",
        {"seed": 3},
    )
    again = lb.ImageGrid.load(grid.save(tmp_path / "grid.png"))
    assert (again.columns, again.rows, again.title, again.settings) == (
        ["one", "two"],
        ["up", "down"],
        "title",
        {"seed": 3},
    )
    assert again.images[0][1] is None and not again.is_whole
    for before, after in (
        (grid.images[0][0], again.images[0][0]),
        (grid.images[1][0], again.images[1][0]),
    ):
        assert before.tobytes() == after.tobytes()


def test_a_place_that_cannot_be_is_no_grid(picture, tmp_path):
    text = PngImagePlugin.PngInfo()
    places = [[[0, 0, 10**6, 10**6, 10**6, 10**6]]]
    content = {"places": places, "columns": [], "rows": [], "title": "", "settings": {}}
    text.add_itxt("lorabook", json.dumps(content))
    picture().save(tmp_path / "foreign.png", pnginfo=text)
    with pytest.raises(ValueError, match="foreign.png is no grid"):
        lb.ImageGrid.load(tmp_path / "foreign.png")


def test_what_is_no_saved_grid_is_one_sentence(picture, tmp_path):
    picture().save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.png"):
        lb.ImageGrid.load(tmp_path / "nowhere.png")
    for name in ("plain.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name} is no grid that ImageGrid.save wrote"):
            lb.ImageGrid.load(tmp_path / name)
