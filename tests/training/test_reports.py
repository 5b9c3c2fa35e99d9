from unittest.mock import Mock

import pytest
from PIL import Image

from conftest import quick_config, quick_train
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot
from lorabook.training import reports

HISTORY = [{"step": 1, "loss": 0.5}]


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would be given to show."""
    figures = []
    monkeypatch.setattr(
        "IPython.display.display", lambda figure, **_: figures.append(figure) or Mock()
    )
    monkeypatch.setattr(reports, "in_notebook", lambda: True)
    return figures


@pytest.fixture
def display(shown):
    display = reports.Display(steps=10, step=0, shown=True)
    yield display
    display.bar.close()


@pytest.fixture
def events():
    """Reads what tensorboard was given."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder / "logs/text2image-fine-tune"))
        events.Reload()
        return events

    return read


def test_a_short_run_has_no_curve(shown, display):
    display.show_losses(HISTORY)
    display.show_losses(HISTORY, last=True)
    assert shown == []


def test_a_run_of_over_a_minute_has_a_curve(shown, display, monkeypatch):
    now = reports.time.perf_counter() + 61
    monkeypatch.setattr(reports.time, "perf_counter", lambda: now)
    display.show_losses(HISTORY)
    assert [type(figure) for figure in shown] == [Plot]


def test_a_short_run_with_pictures_has_a_curve_at_its_end(shown, display):
    display.show_images(ImageGrid([[Image.new("RGB", (8, 8))]]))
    display.show_losses(HISTORY)
    assert [type(figure) for figure in shown] == [ImageGrid]
    display.show_losses(HISTORY, last=True)
    assert [type(figure) for figure in shown] == [ImageGrid, Plot]


def test_a_silent_run_shows_nothing(shown):
    silent = reports.Display(steps=10, step=0, shown=False)
    silent.show_images(ImageGrid([[Image.new("RGB", (8, 8))]]))
    silent.show_losses(HISTORY, last=True)
    assert shown == []


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(reports, "get_available_trackers", list)
    with pytest.warns(
        UserWarning,
        match="report_to wandb: it is not installed.*pip install 'lorabook\\[trackers\\]'",
    ):
        assert reports.installed_trackers(quick_config(report_to="wandb")) == []


def test_none_reports_nothing(silent):
    assert reports.installed_trackers(quick_config(report_to="none")) == []


def test_tensorboard_gets_losses_and_pictures(tmp_path, events):
    quick_train(
        tmp_path,
        report_to="tensorboard",
        validation_prompt="a red cat",
        num_validation_images=2,
        validation_split=0.34,
    )
    read = events(tmp_path)
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3]
    assert {event.step for event in read.Scalars("validation_loss")} >= {0, 3}
    assert read.Images("validation")


def test_the_loss_of_each_image_is_reported_by_its_number(tmp_path, events):
    quick_train(tmp_path, report_to="tensorboard", train_batch_size=1, debug_loss=True)
    tags = events(tmp_path).Tags()["scalars"]
    assert sum(tag.startswith("loss_for_") for tag in tags) == 3


def test_wandb_reports_offline_where_there_is_no_login(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="report_to wandb: no login found, so it reports offline"):
        run = quick_train(tmp_path / "out", report_to="wandb", max_train_steps=2)
    assert run.finished and list((tmp_path / "out/wandb").glob("offline-run-*"))
