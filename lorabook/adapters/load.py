"""Load an adapter onto an ordinary diffusers pipeline, and say what was loaded."""
import html
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from lorabook.adapters.files import METADATA_KEY, WEIGHT_NAME, find_adapter, read_adapter
from lorabook.quiet import quiet

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What `load_adapter` loaded.

    Attributes:
        name: the adapter's name on the pipeline.
        path: the file.
        base_model: the model it was trained for, as its metadata says, or None.
        ranks: number of layers by rank.
        alpha: the alphas that occur.
        layers: number of adapted layers by component.
        keys: number of weights in the file; all of them were matched.
    """

    name: str
    path: Path
    base_model: str | None
    ranks: dict[int, int]
    alpha: tuple[float, ...]
    layers: dict[str, int]
    keys: int

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def __str__(self):
        layers = ", ".join(f"{count} layers in {part}" for part, count in self.layers.items())
        ranks = ", ".join(str(rank) for rank in self.ranks)
        alphas = ", ".join(f"{alpha:g}" for alpha in self.alpha)
        return (f"adapter {self.name!r}: rank {ranks}, alpha {alphas}; {layers}; {self.keys} weights, all matched; "
                f"made for {self.base_model or 'a base model its file does not name'}")

    __repr__ = __str__

    def _repr_html_(self):
        return f"<p>{html.escape(str(self))}</p>"


def load_adapter(pipe, source, name: str | None = None, *, weight_name: str | None = None,
                 subfolder: str | None = None, revision: str | None = None, token: str | None = None,
                 cache_dir: str | None = None, local_files_only: bool = False) -> LoadReport:
    """Load a LoRA onto a pipeline, at scale 1, beside those that are there.

    Args:
        pipe: a diffusers pipeline that can carry LoRA.
        source: a file, a folder, a bundled name ("creatures"), a Hub id, or a TrainingRun.
        name: the adapter's name; None takes the file's or folder's, with dots replaced (see `module_name`).
        weight_name, subfolder, revision, token, cache_dir, local_files_only: as in `from_pretrained`.
    Returns: a LoadReport, which shows itself.
    Raises: FileNotFoundError if there is no such adapter; ValueError for a pickle file, a damaged one, weights that
        are not finite, a name in use, or an adapter made for another architecture. The pipeline is then as before.
    """
    path = find_adapter(source, weight_name=weight_name, subfolder=subfolder, revision=revision, token=token,
                        cache_dir=cache_dir, local_files_only=local_files_only)
    name = module_name(name) if name else module_name(_name_of(source, path))
    if name in adapter_names(pipe):
        raise ValueError(f"the pipeline has an adapter {name!r} already; give this one another name")
    weights, metadata = read_adapter(path)
    before = active_adapters(pipe)
    try:
        with quiet():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        _check_all_matched(pipe, name, weights, path)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        _take_off(pipe, name, before)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit {type(pipe).__name__}: {reason}") from error
    activate(pipe, [*before, name])
    return _report(pipe, name, path, weights, metadata)


def lora_layers(pipe) -> dict[str, dict[str, BaseTunerLayer]]:
    """All layers of a pipeline that can carry adapters, by component and module name."""
    parts = {part: getattr(pipe, part, None) for part in COMPONENTS}
    return {part: {module: layer for module, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
            for part, model in parts.items() if model is not None}


def layers_of(pipe, name: str) -> dict[str, dict[str, BaseTunerLayer]]:
    """The layers that one adapter touches, by component and module name."""
    return {part: touched for part, layers in lora_layers(pipe).items()
            if (touched := {module: layer for module, layer in layers.items() if name in layer.scaling})}


def adapter_names(pipe) -> list[str]:
    """The adapters on a pipeline, in the order they came."""
    return list(dict.fromkeys(name for layers in lora_layers(pipe).values() for layer in layers.values()
                              for name in layer.scaling))


def active_adapters(pipe) -> list[str]:
    """The adapters that take part, in the order they came."""
    active = {name for layers in lora_layers(pipe).values() for layer in layers.values()
              if not layer.disable_adapters for name in layer.active_adapters if name in layer.scaling}
    return [name for name in adapter_names(pipe) if name in active]


def activate(pipe, names: list[str]) -> None:
    """Let exactly these adapters take part; their scales stay as they are and nothing becomes trainable."""
    for layers in lora_layers(pipe).values():
        for layer in layers.values():
            layer.set_adapter(names, inference_mode=True)


def module_name(text: str) -> str:
    """A name that torch takes for a module: no dots or blanks, and none of ModuleDict's own attributes.

    «train», «half» and the like get «_lora» behind them.
    """
    name = re.sub(r"\W", "_", text) or "adapter"
    return f"{name}_lora" if hasattr(torch.nn.ModuleDict(), name) else name


def _name_of(source, path: Path) -> str:
    """The file's name; where that says nothing, the folder's or the Hub repository's."""
    if path.name != WEIGHT_NAME:
        return path.stem
    return path.parent.name if path.parent.parent.name != "snapshots" else str(source).split("/")[-1]


def _check_all_matched(pipe, name: str, weights: dict, path: Path) -> None:
    """diffusers and PEFT pass over keys that fit no module; count what arrived."""
    arrived = sum(len(layers) for layers in layers_of(pipe, name).values())
    expected = len({key.split(".lora")[0] for key in weights if ".lora" in key})
    if not arrived or arrived < expected:
        raise ValueError(f"only {arrived} of its {expected} layers match the pipeline's; it needs its own base model")


def _take_off(pipe, name: str, before: list[str]) -> None:
    if name in adapter_names(pipe):
        pipe.delete_adapters([name])
        activate(pipe, before)


def _report(pipe, name: str, path: Path, weights: dict, metadata: dict) -> LoadReport:
    touched = layers_of(pipe, name)
    layers = [layer for part in touched.values() for layer in part.values()]
    about = json.loads(metadata.get(METADATA_KEY, "{}"))
    base = metadata.get("base_model") or metadata.get("ss_sd_model_name") or about.get("unet.base_model_name_or_path")
    return LoadReport(
        name=name, path=path, base_model=base or None,
        ranks=dict(sorted(Counter(layer.r[name] for layer in layers).items())),
        alpha=tuple(sorted({float(layer.lora_alpha[name]) for layer in layers})),
        layers={part: len(found) for part, found in touched.items()}, keys=len(weights))
