import io
import math

import pytest
from PIL import Image

from lorabook.show.block_plot import plot_blocks, plot_spectra

BLOCKS = {
    "down.0": 1.0,
    "down.1": 2.0,
    "mid": 3.0,
    "up.0": 4.0,
    "up.1": 250.0,
    "text_encoder": 0.05,
}


def words(plot) -> list[str]:
    return [text.get_text() for text in plot.figure.axes[0].texts]


def places(plot) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in plot.figure.axes[0].texts}


def test_every_block_has_a_cell_with_its_number():
    plot = plot_blocks(BLOCKS, label="change")
    assert {"1.0", "2.0", "3.0", "4.0", "250", "0.05"} <= set(words(plot))
    assert Image.open(io.BytesIO(plot._repr_png_())).width > 800


def test_the_blocks_make_up_the_shape_of_a_u():
    where = places(plot_blocks(BLOCKS))
    assert where["down.0"][0] < where["mid"][0] < where["up.0"][0] == where["up.1"][0]
    assert (
        where["down.0"][1]
        == where["up.1"][1]
        < where["down.1"][1]
        == where["up.0"][1]
        < where["mid"][1]
    )
    assert where["text encoder"][0] < where["down.0"][0]


def test_parts_of_a_block_stand_in_the_order_in_which_an_image_passes():
    parts = ["sampler", "attentions_1", "resnets_0", "attentions_0", "resnets_1"]
    where = places(plot_blocks({f"down.0.{part}": 1.0 for part in parts}))
    names = ["res 0", "attn 0", "res 1", "attn 1", "sampler"]
    assert sorted(names, key=lambda name: where[name][0]) == names


def test_a_block_without_a_number_is_an_empty_frame():
    frames = [
        patch for patch in plot_blocks({"up.1": 1.0}).figure.axes[0].patches if not patch.get_fill()
    ]
    assert len(frames) == 4  # down.0, down.1, mid, up.0


def test_notes_stand_under_the_names():
    found = words(plot_blocks(BLOCKS, notes={"mid": "7 %", "text_encoder": "1 %"}))
    assert "mid\n7 %" in found and "text encoder · 1 %" in found


def test_numbers_below_zero_have_white_in_the_middle():
    plot = plot_blocks({"down.0": -2.0, "mid": 0.0, "up.0": 1.0})
    colors = [patch.get_facecolor() for patch in plot.figure.axes[0].patches]
    assert any(min(color[:3]) > 0.95 for color in colors) and "-2.0" in words(plot)


def test_a_number_that_is_none_is_drawn_in_grey():
    plot = plot_blocks({"down.0": math.nan, "mid": 1.0})
    assert "nan" in words(plot) and "from 1.0 in mid to 1.0 in mid" in plot.alt


def test_the_alternative_text_names_the_least_and_the_most():
    assert (
        plot_blocks(BLOCKS, label="change").alt
        == "change by block, 6 in all: from 0.05 in text_encoder to 250 in up.1."
    )


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="no values to draw by block"):
        plot_blocks({})


def test_spectra_are_divided_by_their_largest():
    plot = plot_spectra({"creatures": [4.0, 2.0, 1.0], "ink": [1.0, 0.1]})
    lines = plot.figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 0.5, 0.25], [1.0, 0.1]]
    assert lines[0].get_color() != lines[1].get_color() and "creatures 0.25, ink 0.1" in plot.alt


def test_each_block_has_a_line_of_its_own_look():
    labels = [f"{side}.{i}" for side in ("down", "up") for i in range(4)] + [
        "mid",
        "text_encoder",
        "text_encoder_2",
    ]
    lines = plot_spectra({label: [1.0, 0.5] for label in labels}).figure.axes[0].lines
    assert len({(str(line.get_color()), line.get_marker()) for line in lines}) == len(labels)


def test_values_of_nothing_are_not_drawn():
    (line,) = plot_spectra({"x": [1.0, 0.5, 0.0, 1e-9], "y": [0.0, 0.0]}).figure.axes[0].lines
    assert list(line.get_ydata()) == [1.0, 0.5]


def test_spectra_of_zeros_alone_are_an_error():
    with pytest.raises(ValueError, match="no singular values above zero"):
        plot_spectra({"x": [0.0]})
