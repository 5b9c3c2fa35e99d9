"""The LoRA that is trained: put on a pipeline's UNet and text encoders, and written to a file."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import lorabook
from lorabook.blocks import block_map, block_of, target_modules
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.lora.formats.read import parse
from lorabook.lora.formats.write import to_diffusers, to_kohya, write_adapter
from lorabook.lora.metadata import outgoing, public_name
from lorabook.training.config import TrainingConfig
from lorabook.training.families import StableDiffusion
from lorabook.worlds import world

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER_NAME = "lora"  # on the models while they learn; no file holds it
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
NARROW = 256  # wider than this, the gradient of a whole weight costs more than PEFT's passes


def target_layers(family: StableDiffusion, config: TrainingConfig) -> dict[str, list[str]]:
    """The names of the layers that will be adapted, by component.

    Raises:
        ValueError: If a block is unknown or has no such layers, or the rank is too large for one.
    """
    layers = {"unet": _unet_layers(family.pipe.unet, config.target, config.target_blocks)}
    for component in family.text_encoders if config.train_text_encoder else ():
        names = [name for name, _ in getattr(family.pipe, component).named_modules()]
        layers[component] = [name for name in names if name.endswith(TEXT_TARGETS)]
    for component, names in layers.items():
        for name in names:
            weight = getattr(family.pipe, component).get_submodule(name).weight
            most = min(len(weight), weight[0].numel())
            if config.rank > most:
                raise ValueError(
                    f"rank {config.rank} is larger than layer {name} of shape "
                    f"{tuple(weight.shape)}, whose rank is at most {most}; give a rank up to {most}"
                )
    return layers


def _unet_layers(unet: nn.Module, target: str, blocks: list[str] | None) -> list[str]:
    endings = tuple(f".{ending}" for ending in target_modules(target))
    names = [
        name
        for name, module in unet.named_modules()
        if f".{name}".endswith(endings) and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    usable = block_map(names)
    for block in blocks or ():
        if block not in usable:
            known = {block_of(name) for name, _ in unet.named_modules()} - {"outside"}
            reason = "has no layer for" if block in known else "is no block of this UNet; for"
            raise ValueError(
                f"target_blocks: {block!r} {reason} target {target!r} the blocks are: "
                f"{', '.join(usable)}"
            )
    return [name for name in names if not blocks or block_of(name) in blocks]


def add_lora(family: StableDiffusion, config: TrainingConfig) -> dict[str, nn.Module]:
    """Freeze the pipeline and put a fresh float32 LoRA on it; returns the models that carry it."""
    pipe, layers = family.pipe, target_layers(family, config)
    for component in ("unet", *family.encoders):
        getattr(pipe, component).requires_grad_(False)
    targets = dict.fromkeys(layers, list(TEXT_TARGETS))
    targets["unet"] = layers["unet"] if config.target_blocks else target_modules(config.target)
    models = {component: getattr(pipe, component) for component in layers}
    for component, model in models.items():
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            init_lora_weights="gaussian",
            use_dora=config.use_dora,
            lora_dropout=config.lora_dropout,
            target_modules=targets[component],
        )
        model.add_adapter(lora, adapter_name=ADAPTER_NAME)
        cast_training_params(model, torch.float32)
        if config.gradient_checkpointing and component == "unet":
            model.enable_gradient_checkpointing()
        elif config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    return models


def trainable_parameters(models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that learn, by component and name."""
    return {
        f"{component}.{name}": parameter
        for component, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def write_lora(folder: Path, models: dict[str, nn.Module], config: TrainingConfig) -> Path:
    """Write the LoRA into a folder, with its alpha, base model, trigger words and settings.

    They name no folder of this machine: of the base model and the data their names or Hub ids.
    """
    # lora_A / lora_B throughout: diffusers' own renaming knows attention only and cannot read the
    # mixture it leaves
    weights, settings = {}, {}
    for component, model in models.items():
        tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
        weights |= {f"{component}.{key}": value.detach() for key, value in tensors.items()}
        config_of_peft = model.peft_config[ADAPTER_NAME].to_dict()
        settings[component] = config_of_peft | {"base_model_name_or_path": None}
    given = {
        key: public_name(value) if isinstance(value, str) else value
        for key, value in config.settings.items()
    }
    metadata = {
        "base_model": public_name(config.pretrained_model_name_or_path or world().model),
        "lorabook_version": lorabook.__version__,
        "training": json.dumps(given),
    }
    if config.instance_prompt:
        metadata["instance_prompt"] = config.instance_prompt
        metadata["trigger_words"] = json.dumps([config.instance_prompt])
    metadata, adapter = outgoing(metadata), parse(weights, configs=settings)
    if config.output_kohya_format:
        write_adapter(folder / KOHYA_NAME, to_kohya(adapter), config={}, about=metadata)
    return write_adapter(
        folder / WEIGHT_NAME, to_diffusers(adapter)[0], config=settings, about=metadata
    )


@contextmanager
def merged_products(models: Iterable[nn.Module]) -> Iterator[None]:
    """Compute the narrow LoRA layers of models on a CPU by one product inside the block.

    PEFT computes W x + s B (A x): five passes over activations forward, and more backward. On a CPU
    and in a narrow layer (W + s B A) x costs less: one pass, and the sum of two small matrices.
    Both are the same up to rounding.
    """
    layers = [layer for model in models for layer in model.modules() if _is_narrow(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_narrow(layer: nn.Module) -> bool:
    """Whether it is a plain LoRA on a narrow layer in float32 on the CPU: no dropout, no DoRA."""
    base = getattr(layer, "base_layer", None)
    if type(base) not in (nn.Linear, nn.Conv2d) or len(layer.active_adapters) != 1:
        return False
    name, weight = layer.active_adapters[0], base.weight
    return (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and min(weight.shape[:2]) <= NARROW
        and getattr(base, "groups", 1) == 1
    )


def _forward(layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    name, base = layer.active_adapters[0], layer.base_layer
    down, up = (half[name].weight.flatten(1) for half in (layer.lora_A, layer.lora_B))
    total = torch.addmm(base.weight.flatten(1), up, down, alpha=layer.scaling[name])
    weight = total.view_as(base.weight)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)
