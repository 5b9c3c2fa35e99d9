"""Prompts encoded once."""
import inspect
from collections.abc import Mapping

from lorabook.adapters.layers import active_adapters, lora_layers
from lorabook.sweeps.drawing import encoded

_MOST = 16  # prompts that are kept


class Encoder:
    """A pipeline's text encoders, with what they made of the last prompts."""

    def __init__(self):
        self._made: dict[tuple, Mapping] = {}

    def __call__(self, pipe, prompt: str, negative: str, guided: bool) -> Mapping[str, object]:
        """What to tell the pipeline's call of a prompt: its embeddings, or where they cannot be made apart, the texts."""
        texts = {"prompt": prompt, "negative_prompt": negative or None}
        if not _encodes_apart(pipe):
            return texts
        key = (prompt, negative, guided, len(pipe.tokenizer), _state(pipe))
        if key not in self._made:
            while len(self._made) >= _MOST:
                self._made.pop(next(iter(self._made)))
            self._made[key] = encoded(pipe, prompt, negative or None, guided)
        return self._made[key]


def _encodes_apart(pipe) -> bool:
    """Whether the pipeline is one of those with one or two CLIPs, Stable Diffusion's and SDXL's."""
    takes = inspect.signature(pipe.encode_prompt).parameters if hasattr(pipe, "encode_prompt") else {}
    return "do_classifier_free_guidance" in takes and "clip_skip" in takes and "prompt_3" not in takes


def _state(pipe) -> tuple:
    """What adapters do to the text encoders now; holds the weights themselves, so that no others get their id."""
    names = active_adapters(pipe)
    return tuple((part, module, name, float(layer.scaling[name]), layer.lora_B[name].weight,
                  layer.lora_B[name].weight._version)
                 for part, layers in lora_layers(pipe).items() if part.startswith("text_encoder")
                 for module, layer in layers.items() for name in names if name in layer.scaling)
