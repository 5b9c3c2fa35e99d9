"""One lock for all pipelines that share a model: the studio's thread and the cells of a notebook take turns."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

from lorabook.live.layers import models_of


class PipelineLock:
    """A lock that its owner may take again; whoever lets it go comes after those who wait, as RLock does not promise."""

    def __init__(self):
        self._next, self._lock = Lock(), RLock()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; returns whether that came within about `timeout` seconds, and −1 waits without end."""
        if self.is_mine():
            return self._lock.acquire()
        if not self._next.acquire(timeout=timeout):
            return False
        try:
            return self._lock.acquire(timeout=timeout)
        finally:
            self._next.release()

    def release(self) -> None:
        """Let the lock go, once for each time it was taken."""
        self._lock.release()

    def is_mine(self) -> bool:
        """Whether the calling thread has the lock."""
        return self._lock._is_owned()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


_LOCKS: WeakKeyDictionary[nn.Module, PipelineLock] = WeakKeyDictionary()
_MAKING = RLock()


def lock_of(pipe) -> PipelineLock:
    """The lock of a pipeline's denoiser, which all pipelines with that UNet or transformer share.

    It is for whoever changes the pipeline's adapters or weights, or draws with it. What has no model gets one of its own.
    """
    return _lock_of(pipe) or PipelineLock()


def locked(function: Callable) -> Callable:
    """Let a function have all pipelines among its arguments to itself while it runs."""

    @wraps(function)
    def alone(*args, **named):
        locks = {lock for lock in map(_lock_of, (*args, *named.values())) if lock}
        with ExitStack() as held:
            for lock in sorted(
                locks, key=id
            ):  # in one order, so that two calls never wait for each other
                held.enter_context(lock)
            return function(*args, **named)

    return alone


def _lock_of(pipe) -> PipelineLock | None:
    model = next(iter(models_of(pipe).values()), None)
    if not isinstance(model, nn.Module):
        return None
    with _MAKING:
        return _LOCKS.setdefault(model, PipelineLock())
