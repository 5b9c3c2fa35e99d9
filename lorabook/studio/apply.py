"""The studio's settings put on a pipeline: scales, ranks and blends, as ordinary adapters."""

from collections.abc import Mapping

from lorabook.live.blend import blend
from lorabook.live.layers import adapter_names, models_of
from lorabook.live.manage import disable_adapters, remove_adapter
from lorabook.live.scales import set_scales
from lorabook.live.state import check_known
from lorabook.studio.ranks import Ranks
from lorabook.studio.settings import StudioSettings

BLEND = "studio_blend"  # the name of the adapter that stands for those that are blended


class Applied:
    """What the studio has put on a pipeline, and takes back."""

    def __init__(self, pipe):
        self.pipe, self.ranks = pipe, Ranks(pipe)
        self._blended: tuple | None = None
        self._parts: Mapping[str, object] = {}  # the scales of what is blended

    def apply(self, settings: StudioSettings) -> None:
        """Let the adapters take part as the settings say; those that the settings do not name stay as they are.

        Raises: ValueError for an adapter that the pipeline lacks, a block that it does not have, or an unknown method.
        """
        check_known(self.pipe, settings.adapters)
        scales = self._scales(settings)
        if self._blend_key(settings, scales) != self._blended:
            self._unblend()
        for name, adapter in settings.adapters.items():
            self.ranks.set(name, adapter.rank)
        set_scales(self.pipe, scales)
        if off := [name for name in settings.adapters if name not in scales]:
            disable_adapters(self.pipe, off)
        self._blend(settings, scales)

    def close(self) -> None:
        """Take blends and smaller ranks back; scales stay as they are, and what was blended takes part by itself."""
        blended = {
            name: scale for name, scale in self._parts.items() if name in adapter_names(self.pipe)
        }
        self._unblend()
        self.ranks.close()
        if blended:
            set_scales(self.pipe, blended)

    def _scales(self, settings: StudioSettings) -> dict:
        return {
            name: adapter.scales(models_of(self.pipe))
            for name, adapter in settings.adapters.items()
            if adapter.on
        }

    def _blend_key(self, settings: StudioSettings, scales: Mapping) -> tuple | None:
        if settings.blend_method in (None, "cat") or not scales:
            return None
        return (
            settings.blend_method,
            repr(scales),
            repr([settings.adapters[name].rank for name in scales]),
        )

    def _blend(self, settings: StudioSettings, scales: Mapping) -> None:
        """Put the blend in the place of its adapters, which keep their scales."""
        key = self._blend_key(settings, scales)
        if key is None:
            return
        if key != self._blended or BLEND not in adapter_names(self.pipe):
            blend(
                self.pipe, scales, method=settings.blend_method, new_name=BLEND, across_bases=True
            )
            self._blended, self._parts = key, scales
        disable_adapters(self.pipe, list(scales))

    def _unblend(self) -> None:
        self._blended, self._parts = None, {}
        if BLEND in adapter_names(self.pipe):
            remove_adapter(self.pipe, BLEND)
