import importlib.util

import pytest

import lorabook as lb
from conftest import quick_config
from lorabook.training.trackers import trackers_of


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(
        UserWarning,
        match="report_to wandb: it is not installed.*pip install 'lorabook\\[trackers\\]'",
    ):
        assert trackers_of(quick_config(report_to="wandb")) == []


def test_none_reports_nothing(silent):
    assert trackers_of(quick_config(report_to="none")) == []


def test_tensorboard_gets_losses_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lb.train_text_to_image(
        quick_config(
            output_dir=str(tmp_path),
            report_to="tensorboard",
            validation_prompt="a red cat",
            num_validation_images=2,
            validation_split=0.34,
        )
    )
    events = EventAccumulator(str(tmp_path / "logs/text2image-fine-tune"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert {event.step for event in events.Scalars("validation_loss")} >= {0, 3}
    assert events.Images("validation")


def test_wandb_reports_offline_where_there_is_no_login(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="report_to wandb: no login found, so it reports offline"):
        run = lb.train_text_to_image(
            quick_config(output_dir=str(tmp_path / "out"), report_to="wandb", max_train_steps=2)
        )
    assert run.finished and list((tmp_path / "out/wandb").glob("offline-run-*"))


def test_the_loss_of_each_image_is_reported_by_its_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lb.train_text_to_image(
        quick_config(
            output_dir=str(tmp_path), report_to="tensorboard", train_batch_size=1, debug_loss=True
        )
    )
    events = EventAccumulator(str(tmp_path / "logs/text2image-fine-tune"))
    events.Reload()
    assert sum(tag.startswith("loss_for_") for tag in events.Tags()["scalars"]) == 3
