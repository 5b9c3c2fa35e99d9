import io
from pathlib import Path

import pytest
from PIL import Image

import lorabook as lb
from lorabook.training.run import TrainingRun

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


def test_runs_are_told_apart_and_their_ends_stand_in_words():
    runs = {label: TrainingRun(Path("x"), [{"step": 0, "validation_loss": 1.0}, {"step": 5, "validation_loss": end}], "")
            for label, end in (("slow", 0.75), ("fast", 0.25))}
    plot = lb.plot_runs(runs)
    assert plot.alt == "Validation loss against steps; at the end: slow 0.75, fast 0.25."
    assert len({line.get_color() for line in plot.figure.axes[0].lines}) == 2


def test_a_run_without_validation_loss_is_named():
    with pytest.raises(ValueError, match="run 'x' has no validation loss"):
        lb.plot_runs({"x": TrainingRun(Path("x"), [{"step": 1, "loss": 1.0}], "")})


def test_similarities_have_axes_of_their_own():
    plot = lb.plot_losses([{"step": 1, "loss": 1.0, "prompt_similarity": 0.2, "image_similarity": 0.5},
                           {"step": 2, "loss": 0.5, "prompt_similarity": 0.3, "image_similarity": 0.6}])
    assert len(plot.figure.axes) == 2 and "like their prompt from 0.20 to 0.30" in plot.alt
