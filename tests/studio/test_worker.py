import threading
import time

import pytest

from lorabook.live.state import PipelineLock
from lorabook.studio.generate import Stopped, StudioImages
from lorabook.studio.settings import StudioSettings
from lorabook.studio.worker import Renderer, sentence_of


class Slow:
    """Paints nothing, in ten steps of a hundredth of a second, and notes what came of it."""

    def __init__(self):
        self.shown, self.failed, self.begun, self.stopped, self.steps = [], [], [], 0, 0
        self.renderer = Renderer(self.paint, self.shown.append, self.failed.append)

    def paint(self, settings, *, preview, stopped):
        self.begun.append((settings.prompt, preview))
        if settings.prompt == "wrong":
            raise ValueError("that is wrong")
        for _ in range(3 if preview else 10):
            if stopped():
                self.stopped += 1
                raise Stopped
            self.steps += 1
            time.sleep(0.01)
        return StudioImages(settings, [], None, 0.0, preview)

    def ask(self, *prompts, pause=0.0):
        for prompt in prompts:
            self.renderer.request(StudioSettings(prompt))
            time.sleep(pause)

    def pictures(self):
        return [(images.settings.prompt, images.preview) for images in self.shown]


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.renderer.close()


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "lorabook studio"]


def test_a_preview_comes_first_and_then_the_full_picture(slow):
    slow.ask("a")
    assert slow.renderer.wait(10) and slow.pictures() == [("a", True), ("a", False)]


def test_of_many_requests_the_newest_is_images_and_no_queue_forms(slow):
    slow.ask(*"abcdefghij")
    assert slow.renderer.wait(10) and slow.pictures()[-1] == ("j", False)
    assert len({prompt for prompt, _ in slow.begun}) <= 3


def test_a_full_picture_under_way_is_stopped_within_a_step(slow):
    slow.ask("a", pause=0.06)  # its preview is shown, its full picture begun
    slow.ask("b")
    assert slow.renderer.wait(10) and ("a", False) not in slow.pictures() and slow.stopped == 1
    assert slow.pictures()[-2:] == [("b", True), ("b", False)]


def test_a_long_drag_shows_previews_meanwhile(slow):
    slow.ask(*map(str, range(60)), pause=0.02)
    assert slow.renderer.wait(10)
    assert 2 <= sum(preview for _, preview in slow.pictures()) <= 10 and slow.pictures()[-1] == (
        "59",
        False,
    )


def test_pictures_come_in_the_order_of_their_requests(slow):
    slow.ask(*map(str, range(30)), pause=0.03)
    assert slow.renderer.wait(10)
    order = [int(prompt) for prompt, _ in slow.pictures()]
    assert order == sorted(order)


def test_an_error_is_told_and_the_next_request_works(slow):
    slow.ask("wrong")
    assert slow.renderer.wait(10) and slow.failed == ["that is wrong"] and not slow.shown
    slow.ask("b")
    assert slow.renderer.wait(10) and slow.pictures()[-1] == ("b", False)


def test_an_error_in_showing_is_told_too(slow):
    slow.renderer._show = lambda images: 1 / 0
    slow.ask("a")
    assert slow.renderer.wait(10) and "ZeroDivisionError" in slow.failed[0]


def test_it_waits_for_its_turn_and_then_paints_the_newest_only(slow):
    lock = PipelineLock()
    slow.renderer = Renderer(slow.paint, slow.shown.append, slow.failed.append, lambda: lock)
    with lock:
        slow.ask("a", "b", "c", pause=0.07)
        assert not slow.renderer.wait() and not slow.begun  # who has the lock would wait for ever
    assert (
        slow.renderer.wait(10)
        and slow.begun[0] == ("c", True)
        and slow.pictures() == [("c", True), ("c", False)]
    )


def test_closing_stops_one_that_waits_for_its_turn(slow):
    lock = PipelineLock()
    slow.renderer = Renderer(slow.paint, slow.shown.append, slow.failed.append, lambda: lock)
    with lock:
        slow.ask("a")
        slow.renderer.close()
    assert not slow.begun


def test_no_thread_is_left(slow):
    slow.ask("a")
    assert len(workers()) == 1 and slow.renderer.wait(10)
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers()


def test_waiting_gives_up_in_time_and_closing_stops(slow):
    slow.ask("a")
    assert not slow.renderer.wait(0.001)
    slow.renderer.close()
    slow.ask("b")
    assert (
        slow.renderer.wait(0)
        and ("a", False) not in slow.pictures()
        and "b" not in dict(slow.begun)
    )


def test_showing_may_ask_for_more(slow):
    def show(images):
        slow.shown.append(images)
        if images.settings.prompt == "a":
            slow.ask("b")

    slow.renderer._show = show
    slow.ask("a")
    assert slow.renderer.wait(10) and slow.pictures()[-1] == ("b", False)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no such block\n\nbecause of that"), "no such block"),
        (KeyError("x"), "this did not work: KeyError 'x'"),
        (RuntimeError("long " * 500), "RuntimeError long"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_are_told_in_one_sentence(error, says):
    assert (
        says in sentence_of(error)
        and len(sentence_of(error)) <= 400
        and "\n" not in sentence_of(error)
    )
