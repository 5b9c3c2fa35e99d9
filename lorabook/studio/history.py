"""Back and forth in the studio's settings."""

import math
import time
from collections.abc import Mapping

from lorabook.studio.settings import StudioSettings


class History:
    """Settings one after another, to go back and forth in; the steps of one slider's drag count as one."""

    def __init__(self, settings: StudioSettings, *, pause: float = 1.0, most: int = 200):
        """Args: settings to begin with; seconds after which another movement of a slider counts anew; how many to keep."""
        self._kept, self._place, self._pause, self._most = [settings], 0, pause, most
        self._moved: tuple[frozenset, float] = (frozenset(), -math.inf)

    @property
    def present(self) -> StudioSettings:
        """The settings in force."""
        return self._kept[self._place]

    @property
    def can_undo(self) -> bool:
        """Whether there is something before."""
        return self._place > 0

    @property
    def can_redo(self) -> bool:
        """Whether something was undone."""
        return self._place + 1 < len(self._kept)

    def push(self, settings: StudioSettings) -> None:
        """Settings that follow on the present ones; what was undone is forgotten."""
        changed, now = _differences(self.present, settings), time.monotonic()
        if not changed:
            return
        drag = (
            len(changed) < 3 and changed == self._moved[0] and now - self._moved[1] < self._pause
        )  # a crossfade moves two
        same = drag and self.can_undo and not self.can_redo
        self._kept[self._place + (not same) :] = [settings]
        self._kept = self._kept[-self._most :]
        self._place, self._moved = len(self._kept) - 1, (changed, now)

    def drop(self) -> None:
        """Take the newest settings out, as if they had never been."""
        self._kept.pop()
        self._place, self._moved = len(self._kept) - 1, (frozenset(), -math.inf)

    def undo(self) -> StudioSettings:
        """Go back by one, where there is one; returns the settings then in force."""
        return self._go(-1 if self.can_undo else 0)

    def redo(self) -> StudioSettings:
        """Go forth by one, where there is one; returns the settings then in force."""
        return self._go(1 if self.can_redo else 0)

    def _go(self, places: int) -> StudioSettings:
        self._place, self._moved = self._place + places, (frozenset(), -math.inf)
        return self.present


def _differences(one: StudioSettings, other: StudioSettings) -> frozenset[str]:
    """The names of what differs, as "prompt" or "adapters.ink.blocks.up.1"."""
    one, other = _flat(one.to_dict()), _flat(other.to_dict())
    return frozenset(
        key for key in one.keys() | other.keys() if one.get(key, 1) != other.get(key, 1)
    )


def _flat(values: Mapping, before: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= (
            _flat(value, f"{before}{key}.")
            if isinstance(value, Mapping)
            else {f"{before}{key}": value}
        )
    return found
