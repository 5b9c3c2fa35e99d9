import io

import pytest
from PIL import Image

import lorabook as lb

HISTORY = [{"step": 0, "validation_loss": 0.9}] + [{"step": i, "loss": 1 / i} for i in range(1, 30)] + [
    {"step": 30, "loss": 0.1, "validation_loss": 0.2}]


def test_losses_are_drawn_with_both_curves():
    plot = lb.plot_losses(HISTORY)
    assert Image.open(io.BytesIO(plot._repr_png_())).width > 300
    assert len(plot.figure.axes[0].lines) == 3


def test_the_alternative_text_gives_the_numbers():
    assert "0.90 to 0.20" in lb.plot_losses(HISTORY).alt


def test_the_smoothed_curve_starts_where_the_losses_do():
    smoothed = lb.plot_losses(HISTORY).figure.axes[0].lines[1].get_ydata()
    assert smoothed[0] == pytest.approx(1.0) and smoothed[-1] < 0.2


def test_an_empty_history_is_an_error():
    with pytest.raises(ValueError, match="no losses"):
        lb.plot_losses([{"step": 0, "validation_loss": 1.0}])
