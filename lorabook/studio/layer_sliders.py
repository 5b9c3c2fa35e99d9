"""Expert mode: a slider for each kind of layer, and for each transformer, resnet and sampler of each block."""

from collections.abc import Callable, Mapping, Sequence

from lorabook.studio.controls import ScaleSlider, row, stack, words
from lorabook.studio.settings import AdapterSettings

_SHORT = {"attentions": "transformer", "resnets": "resnet"}


class PartSliders:
    """Sliders of one adapter's parts: kinds above, then block by block; `box` is the widget, `sliders` go by part."""

    def __init__(
        self,
        name: str,
        kinds: Sequence[str],
        parts: Mapping[str, Sequence[str]],
        moved: Callable[[str, float], None],
    ):
        """Args: the adapter's name; kinds of layers; parts by block; what takes a part ("up.1.sampler") and its scale."""

        def slider(key: str, label: str) -> ScaleSlider:
            return ScaleSlider(label, lambda value: moved(key, value), about=f"{name}: {key}")

        self.sliders = {kind: slider(kind, kind) for kind in kinds}
        groups = (
            [_group("kinds of layers, in all blocks", [self.sliders[kind] for kind in kinds])]
            if kinds
            else []
        )
        for block, inside in parts.items():
            made = {f"{block}.{part}": slider(f"{block}.{part}", _label(part)) for part in inside}
            self.sliders |= made
            groups.append(_group(block, list(made.values())))
        self.box = stack(*groups, kind="lorabook-parts")

    def show(self, settings: AdapterSettings) -> None:
        """Let the sliders stand as the settings say."""
        for part, slider in self.sliders.items():
            slider.show(settings.parts.get(part, 1.0))


def _group(title: str, sliders: Sequence[ScaleSlider]):
    return stack(
        words(title, kind="lorabook-title"),
        row(*(slider.box for slider in sliders), kind="lorabook-cells"),
    )


def _label(part: str) -> str:
    what, _, number = part.partition("_")
    return f"{_SHORT.get(what, what)} {number}".strip()
