"""An adapter as a prompt names it, and the scales that this asks for."""

from dataclasses import dataclass

from lorabook.live.block_weights import TEXTS, from_block_weights
from lorabook.live.presets import preset


@dataclass(frozen=True)
class Mention:
    """An adapter as a prompt names it.

    Attributes:
        name: as written.
        text_encoder, unet: the weights.
        blocks: a preset's name, a vector of block weights, or None.
        start, stop: the denoising step with which it begins to act on the UNet, and the one with which it ends, counted
            from 0; between 0 and 1 a share of the steps; None is from the first and to the last.
        phrase: the whole of it, as written.
    """

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0
    blocks: str | tuple[float, ...] | None = None
    phrase: str = ""
    start: float | None = None
    stop: float | None = None

    def scales(self, family: str, steps: int | None = None) -> float | dict:
        """The scales it asks for, as `set_scales` takes them.

        Args:
            family: "sd" or "sdxl".
            steps: of the denoising, of which `start` and `stop` are some.
        """
        shares = self._shares(steps)
        said = self._weights(family)
        if not shares:
            return said
        return (
            said if isinstance(said, dict) else dict.fromkeys((*TEXTS[family], "unet"), said)
        ) | {"steps": shares}

    def _shares(self, steps: int | None) -> list[list[float]]:
        """The shares of the run in which it does not act."""
        if self.start is None and self.stop is None:
            return []
        if steps is None:
            raise phrase_error(
                self.phrase,
                "start=, stop= and step= count steps of the denoising, and none are told",
            )
        start = 0 if self.start is None else _step(self.start, steps)
        stop = steps if self.stop is None else _step(self.stop, steps)
        if self.start is not None and self.stop is not None and start >= stop:
            raise phrase_error(
                self.phrase,
                f"with {steps} steps it would end, at {stop}, before it begins, at {start}",
            )
        ends = ((0.0, min(start / steps, 1.0)), (min(stop / steps, 1.0), 1.0))
        return [[begin, end, 0.0] for begin, end in ends if begin < end]

    def _weights(self, family: str) -> float | dict:
        if self.blocks is None and self.text_encoder == self.unet:
            return self.unet
        if self.blocks is None:
            return dict.fromkeys(TEXTS[family], self.text_encoder) | {"unet": self.unet}
        named = isinstance(self.blocks, str)
        parts = (
            preset(self.blocks, family) if named else from_block_weights(self.blocks, family=family)
        )
        unet = parts.pop("unet")
        unet = {"*": self.unet} | unet if isinstance(unet, dict) else self.unet * unet
        return {text: self.text_encoder * number for text, number in parts.items()} | {"unet": unet}


def phrase_error(phrase: str, reason: str) -> ValueError:
    """What to raise for a phrase that cannot be used."""
    phrase = phrase if len(phrase) <= 120 else f"{phrase[:117]}..."
    return ValueError(f"the prompt's {phrase!r} cannot be used: {reason}"[:400])


def _step(number: float, steps: int) -> int:
    """A step, or a share of the steps, which is one step at the least."""
    return max(1, round(number * steps)) if 0 < number < 1 else int(number)
