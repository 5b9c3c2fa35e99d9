"""One worker that generates for the newest settings, and stops what they make stale."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lorabook.live.state import PipelineLock
from lorabook.studio.generate import Stopped, StudioImages
from lorabook.studio.settings import StudioSettings

# Seconds for which a shown image is new enough to stop the next preview, so that a drag shows some.
YOUNG = 0.4
_PATIENCE = 0.05  # seconds between looks whether waiting for the pipeline still makes sense


class Renderer:
    """Generates in a thread of its own: first a preview, then the full image; the newest win.

    There is no queue: what was requested before the newest settings is forgotten. The thread ends
    when nothing is left to do. In it, and without the lock, `show` takes each result and `fail` the
    sentence of an error.
    """

    def __init__(
        self,
        generate: Callable[..., StudioImages],
        show: Callable[[StudioImages], None],
        fail: Callable[[str], None],
        lock: Callable[[], PipelineLock] = PipelineLock,
    ):
        self._generate, self._show, self._fail, self._lock = generate, show, fail, lock
        self._changed = threading.Condition()
        self._wanted: StudioSettings | None = None
        self._worker: threading.Thread | None = None
        self._shown_at = float("-inf")
        self._closed = False

    def request(self, settings: StudioSettings) -> None:
        """Generate for these settings as soon as may be; returns at once."""
        _release_threads()
        with self._changed:
            if self._closed:
                return
            self._wanted = settings
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="lorabook studio")
                self._worker.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; returns whether that came within `timeout` seconds.

        Who has the pipeline (within `lb.fused`, or in a callback of a call) does not wait, since
        nothing would come.
        """
        if threading.current_thread() is self._worker:
            return False
        timeout = 0 if self._lock().is_mine() else timeout
        with self._changed:
            return self._changed.wait_for(lambda: self._worker is None, timeout)

    def close(self) -> None:
        """Stop what runs, within one step, and take no more requests."""
        with self._changed:
            self._closed, self._wanted = True, None
            if threading.current_thread() is not self._worker:
                self._changed.wait_for(lambda: self._worker is None)

    def _work(self) -> None:
        try:
            while (settings := self._next()) is not None:
                self._run(settings)
        finally:  # whatever happened, the next request starts anew
            with self._changed:
                if self._worker is threading.current_thread():
                    self._end()

    def _next(self) -> StudioSettings | None:
        with self._changed:
            settings, self._wanted = self._wanted, None
            if settings is None or _is_exiting():
                self._end()  # together with looking, so that a later request starts another
                return None
            return settings

    def _end(self) -> None:
        self._worker = None
        self._changed.notify_all()

    def _run(self, settings: StudioSettings) -> None:
        try:
            for preview in (True, False):
                stale = lambda preview=preview: self._is_stale(preview)  # noqa: E731
                with self._turn():
                    images = self._generate(settings, preview=preview, stopped=stale)
                if stale():
                    return
                self._show(images)
                self._shown_at = time.monotonic()
                if not images.preview:
                    return
        except Stopped:
            return
        except Exception as error:
            if self._wanted is None and not self._closed:
                self._fail(sentence_of(error))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, for one image; raises Stopped where newer settings come before it is free."""
        lock = self._lock()
        while not lock.acquire(_PATIENCE):
            if self._is_stale(preview=False):
                raise Stopped
        try:
            if self._is_stale(preview=False):
                raise Stopped
            yield
        finally:
            lock.release()

    def _is_stale(self, preview: bool) -> bool:
        is_young = time.monotonic() - self._shown_at < YOUNG
        has_newer = self._wanted is not None and (is_young or not preview)
        return self._closed or _is_exiting() or has_newer


def sentence_of(error: Exception) -> str:
    """An error in one line of at most 400 characters; with its kind where it is not for people."""
    words = " ".join(str(error).split("\n\n")[0].split())
    if not (isinstance(error, (ValueError, OSError)) and words):
        words = f"this did not work: {type(error).__name__} {words}".rstrip()
    return words[:400]


def _is_exiting() -> bool:
    """Whether the program has come to its end, which waits for this thread."""
    return not threading.main_thread().is_alive()


def _release_threads() -> None:
    """Give the calling thread's OpenMP pool back, so that the worker has all cores.

    Once the pools of several threads have more threads than there are cores, GNU's OpenMP wakes a
    helper for every small operation: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    openmp = ctypes.CDLL(torch._C.__file__)
    if hasattr(openmp, "omp_pause_resource_all"):
        openmp.omp_pause_resource_all(2)  # omp_pause_hard; the next operation makes the pool anew
