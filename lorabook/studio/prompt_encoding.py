"""Prompts encoded once."""

from collections.abc import Mapping

from lorabook.live.generate import check_prompt, prompt_arguments, takes_embeddings
from lorabook.live.layers import active_adapters, lora_layers

_MOST = 16  # prompts that are kept
_INSTEAD = "load {name!r} from the shelf or by studio.load(file), and set its slider to {weight}"


class Encoder:
    """A pipeline's text encoders, with what they made of the last prompts."""

    def __init__(self):
        self._made: dict[tuple, Mapping] = {}

    def __call__(
        self, pipe, prompt: str, negative: str, guidance_scale: float
    ) -> Mapping[str, object]:
        """What to tell the pipeline's call of a prompt: its embeddings, or where they cannot be made apart, the texts.

        Raises: ValueError for a prompt that cannot be read, see `read`.
        """
        prompt, negative = read(prompt, negative)
        call = {"guidance_scale": guidance_scale}
        if not takes_embeddings(pipe, call):
            return prompt_arguments(pipe, prompt, negative, call)
        key = (prompt, negative, guidance_scale > 1, len(pipe.tokenizer), _state(pipe))
        if key not in self._made:
            while len(self._made) >= _MOST:
                self._made.pop(next(iter(self._made)))
            self._made[key] = prompt_arguments(pipe, prompt, negative, call)
        return self._made[key]


def read(prompt: str, negative: str) -> tuple[str, str | None]:
    """The prompts, checked; None for no negative prompt.

    Raises: ValueError for what `generate` cannot read either, and for the adapters that a prompt names, which have sliders.
    """
    return check_prompt(prompt, "prompt", _INSTEAD), check_prompt(
        negative, "negative_prompt", _INSTEAD
    ) or None


def _state(pipe) -> tuple:
    """What adapters do to the text encoders now; holds the weights themselves, so that no others get their id."""
    names = active_adapters(pipe)
    return tuple(
        (
            part,
            module,
            name,
            float(layer.scaling[name]),
            layer.lora_B[name].weight,
            layer.lora_B[name].weight._version,
        )
        for part, layers in lora_layers(pipe).items()
        if part.startswith("text_encoder")
        for module, layer in layers.items()
        for name in names
        if name in layer.scaling
    )
