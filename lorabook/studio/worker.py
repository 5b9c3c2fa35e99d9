"""One worker that draws the newest settings and stops what they make stale."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorabook.live.state import PipelineLock
from lorabook.studio.generate import Painted, Stopped
from lorabook.studio.settings import StudioSettings
from lorabook.studio.threads import give_threads_back

YOUNG = 0.4  # seconds for which a shown picture is new enough to stop the next preview, so that a drag still shows some
_LOOK = 0.05  # seconds after which one that waits for the pipeline looks whether it should go on waiting


class Renderer:
    """Draws settings in a thread of its own: first a preview, then the full picture; the newest settings always win.

    There is no queue: whatever was asked for before the newest is forgotten. The thread ends when nothing is left to do.
    """

    def __init__(
        self,
        paint: Callable[..., Painted],
        show: Callable[[Painted], None],
        fail: Callable[[str, StudioSettings], None],
        lock: Callable[[], PipelineLock] = PipelineLock,
    ):
        """Args: `Painter.paint`; what takes each result; what takes an error's sentence and its settings; what gives
        the lock of what is painted on. The second and third are called in the worker's thread, without the lock."""
        self._paint, self._show, self._fail, self._lock = paint, show, fail, lock
        self._changed = threading.Condition()
        self._wanted: StudioSettings | None = None
        self._worker: threading.Thread | None = None
        self._shown = float("-inf")
        self._closed = False

    def request(self, settings: StudioSettings) -> None:
        """Let these settings be painted as soon as may be; returns at once."""
        give_threads_back()
        with self._changed:
            if self._closed:
                return
            self._wanted = settings
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="lorabook studio")
                self._worker.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; returns whether that came within `timeout` seconds.

        Where the caller itself has the pipeline (within `lb.fused`, or a callback of a call), nothing would come, so it
        does not wait.
        """
        if threading.current_thread() is self._worker:
            return False
        with self._changed:
            return self._changed.wait_for(
                lambda: self._worker is None, 0 if self._lock().is_mine() else timeout
            )

    def close(self) -> None:
        """Stop what runs, within one step, and take no more requests."""
        with self._changed:
            self._closed, self._wanted = True, None
            if threading.current_thread() is not self._worker:
                self._changed.wait_for(lambda: self._worker is None)

    def _work(self) -> None:
        try:
            while (settings := self._next()) is not None:
                self._draw(settings)
        finally:  # whatever happened, the next request starts anew
            with self._changed:
                if self._worker is threading.current_thread():
                    self._worker = None
                    self._changed.notify_all()

    def _next(self) -> StudioSettings | None:
        with self._changed:
            settings, self._wanted = self._wanted, None
            if settings is None or _is_leaving():
                self._worker = (
                    None  # in one go with looking, so that a request behind it starts another
                )
                self._changed.notify_all()
                return None
            return settings

    def _draw(self, settings: StudioSettings) -> None:
        try:
            for preview in (True, False):
                with self._turn():
                    painted = self._paint(
                        settings,
                        preview=preview,
                        stopped=lambda preview=preview: self._is_stale(preview),
                    )
                if self._is_stale(preview):
                    return
                self._show(painted)
                self._shown = time.monotonic()
                if not painted.preview:
                    return
        except Stopped:
            return
        except Exception as error:
            if self._wanted is None and not self._closed:
                self._fail(in_one_sentence(error), settings)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, for one picture; raises Stopped where newer settings come while others have it."""
        lock = self._lock()
        mine = lock.acquire(0)
        while not mine:
            mine = lock.acquire(_LOOK)
            if self._is_stale(preview=False):
                if mine:
                    lock.release()
                raise Stopped
        try:
            yield
        finally:
            lock.release()

    def _is_stale(self, preview: bool) -> bool:
        young = time.monotonic() - self._shown < YOUNG
        return self._closed or _is_leaving() or self._wanted is not None and (young or not preview)


def in_one_sentence(error: Exception) -> str:
    """What went wrong, on one line of at most 400 characters; the kind of error too where it is not meant for people."""
    said = " ".join(str(error).split("\n\n")[0].split())
    meant = isinstance(error, (ValueError, OSError)) and said
    return (said if meant else f"this did not work: {type(error).__name__} {said}".rstrip())[:400]


def _is_leaving() -> bool:
    """Whether the program has come to its end, which waits for this thread."""
    return not threading.main_thread().is_alive()
