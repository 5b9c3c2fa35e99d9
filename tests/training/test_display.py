from unittest.mock import Mock

import pytest
from PIL import Image

from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot
from lorabook.training import display

HISTORY = [{"step": 1, "loss": 0.5}]


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would be given to show."""
    given = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **_: given.append(thing) or Mock())
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    return given


@pytest.fixture
def watched(shown):
    made = display.Display(steps=10, done=0, shown=True)
    yield made
    made.close()


def test_a_short_run_has_no_curve(shown, watched):
    watched.losses(HISTORY)
    watched.losses(HISTORY, last=True)
    assert shown == []


def test_a_run_of_over_a_minute_has_a_curve(shown, watched, monkeypatch):
    now = display.time.perf_counter() + 61
    monkeypatch.setattr(display.time, "perf_counter", lambda: now)
    watched.losses(HISTORY)
    assert [type(thing) for thing in shown] == [Plot]


def test_a_short_run_with_pictures_has_a_curve_at_its_end(shown, watched):
    watched.strip(ImageGrid([[Image.new("RGB", (8, 8))]]))
    watched.losses(HISTORY)
    assert [type(thing) for thing in shown] == [ImageGrid]
    watched.losses(HISTORY, last=True)
    assert [type(thing) for thing in shown] == [ImageGrid, Plot]


def test_a_silent_run_shows_nothing(shown):
    silent = display.Display(steps=10, done=0, shown=False)
    silent.strip(ImageGrid([[Image.new("RGB", (8, 8))]]))
    silent.losses(HISTORY, last=True)
    assert shown == []
