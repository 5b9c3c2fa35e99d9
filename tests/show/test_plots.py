import base64
import io
from pathlib import Path

import matplotlib.style
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

import lorabook as lb
from lorabook.show.plots import line_look
from lorabook.training.run import TrainingRun

HISTORY = (
    [{"step": 0, "validation_loss": 0.9}]
    + [{"step": i, "loss": 1 / i} for i in range(1, 30)]
    + [{"step": 30, "loss": 0.1, "validation_loss": 0.2}]
)


def test_losses_are_drawn_with_both_curves():
    plot = lb.plot_losses(HISTORY)
    assert Image.open(io.BytesIO(plot._repr_png_())).width > 300
    assert len(plot.figure.axes[0].lines) == 3


def test_the_alternative_text_gives_the_numbers():
    assert "0.90 to 0.20" in lb.plot_losses(HISTORY).alt


def test_a_notebook_gets_the_figure_and_its_content_in_words():
    plot = lb.plot_losses(HISTORY)
    data, metadata = DisplayFormatter().format(plot)
    assert base64.b64decode(data["image/png"]) == plot._repr_png_()
    assert (
        metadata["image/png"]["alt"] == plot.alt and data["text/plain"] == f"Plot(alt={plot.alt!r})"
    )


def test_a_dark_style_of_matplotlib_changes_nothing():
    light = lb.plot_losses(HISTORY)._repr_png_()
    with matplotlib.style.context(["dark_background", {"savefig.facecolor": "none"}]):
        assert lb.plot_losses(HISTORY)._repr_png_() == light


def test_fifteen_lines_are_told_apart():
    assert len({tuple(line_look(number).values()) for number in range(15)}) == 15


def test_the_smoothed_curve_starts_where_the_losses_do():
    smoothed = lb.plot_losses(HISTORY).figure.axes[0].lines[1].get_ydata()
    assert smoothed[0] == pytest.approx(1.0) and smoothed[-1] < 0.2


def test_an_empty_history_is_an_error():
    with pytest.raises(ValueError, match="no losses"):
        lb.plot_losses([{"step": 0, "validation_loss": 1.0}])


def test_runs_are_told_apart_and_their_ends_stand_in_words():
    runs = {
        label: TrainingRun(
            Path("x"),
            [{"step": 0, "validation_loss": 1.0}, {"step": 5, "validation_loss": end}],
            "",
        )
        for label, end in (("slow", 0.75), ("fast", 0.25))
    }
    plot = lb.plot_runs(runs)
    assert plot.alt == "Validation loss against step; at the end: slow 0.75, fast 0.25."
    assert len({line.get_color() for line in plot.figure.axes[0].lines}) == 2


def test_a_run_without_validation_loss_is_named():
    with pytest.raises(ValueError, match="run 'x' has no validation loss"):
        lb.plot_runs({"x": TrainingRun(Path("x"), [{"step": 1, "loss": 1.0}], "")})


def test_similarities_have_axes_of_their_own():
    plot = lb.plot_losses(
        [
            {"step": 1, "loss": 1.0, "prompt_similarity": 0.2, "image_similarity": 0.5},
            {"step": 2, "loss": 0.5, "prompt_similarity": 0.3, "image_similarity": 0.6},
        ]
    )
    assert len(plot.figure.axes) == 2 and "like their prompt from 0.20 to 0.30" in plot.alt


def test_lines_start_at_zero_and_are_told_in_words():
    plot = lb.plot_lines({"svd": [(1, 0.5), (8, 0.125)]}, xlabel="rank", ylabel="relative error")
    assert plot.alt == "Relative error against rank; at the end: svd 0.12."
    assert plot.figure.axes[0].get_ylim()[0] == 0


def test_bars_stand_in_the_order_given_with_their_values():
    plot = lb.plot_bars({"base": 10, "fused": 12.5}, label="milliseconds")
    assert plot.alt == "Milliseconds: base 10, fused 12.5."
    axes = plot.figure.axes[0]
    assert axes.yaxis_inverted() and [text.get_text().strip() for text in axes.texts] == [
        "10",
        "12.5",
    ]


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="there is nothing to draw: give each line its points"):
        lb.plot_lines({"svd": []}, xlabel="rank", ylabel="error")
    with pytest.raises(ValueError, match="there is nothing to draw: give at least one value"):
        lb.plot_bars({}, label="milliseconds")
