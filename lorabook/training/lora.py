"""The LoRA that is trained: put on a pipeline's UNet and text encoders, and written as diffusers writes it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
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
NAME = "lora"  # on the models while they learn; no file holds it
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"


def target_layers(unet: nn.Module, config: TrainingConfig) -> list[str]:
    """The names of the UNet's layers that will be adapted.

    Raises: ValueError if a block is unknown or has no such layers, or if the rank is larger than a layer.
    """
    endings = tuple(f".{ending}" for ending in target_modules(config.target))
    names = [
        name
        for name, module in unet.named_modules()
        if f".{name}".endswith(endings) and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    blocks = block_map(names)
    for block in config.target_blocks or ():
        if block not in blocks:
            known = sorted({block_of(name) for name, _ in unet.named_modules()} - {"outside"})
            reason = "has no layer for" if block in known else "is no block of this UNet; for"
            raise ValueError(
                f"target_blocks: {block!r} {reason} target {config.target!r} the blocks are: "
                f"{', '.join(blocks)}"
            )
    if config.target_blocks:
        names = [name for name in names if block_of(name) in config.target_blocks]
    _check_rank(unet, names, config.rank)
    return names


def check_layers(family: StableDiffusion, config: TrainingConfig) -> None:
    """Raise ValueError if the target matches no layer, or if the rank is larger than one of the layers."""
    target_layers(family.pipe.unet, config)
    for part in family.text_encoders if config.train_text_encoder else ():
        model = getattr(family.pipe, part)
        _check_rank(
            model,
            [name for name, _ in model.named_modules() if name.endswith(TEXT_TARGETS)],
            config.rank,
        )


def add_lora(family: StableDiffusion, config: TrainingConfig) -> dict[str, nn.Module]:
    """Freeze the pipeline and put a fresh LoRA on it, trainable and in float32.

    Returns: the models that carry it, by component.
    """
    pipe, layers = family.pipe, target_layers(family.pipe.unet, config)
    for model in (pipe.unet, pipe.vae, *(getattr(pipe, part) for part in family.text_encoders)):
        model.requires_grad_(False)
    targets = {"unet": layers if config.target_blocks else target_modules(config.target)}
    if config.train_text_encoder:
        targets |= dict.fromkeys(family.text_encoders, list(TEXT_TARGETS))
    carriers = {part: getattr(pipe, part) for part in targets}
    for part, model in carriers.items():
        model.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha or config.rank,
                init_lora_weights="gaussian",
                use_dora=config.use_dora,
                lora_dropout=config.lora_dropout,
                target_modules=targets[part],
            ),
            adapter_name=NAME,
        )
        cast_training_params(model, torch.float32)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing() if part == "unet" else model.gradient_checkpointing_enable()
    return carriers


def trainable_parameters(carriers: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn, by component and name."""
    for part, model in carriers.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{part}.{name}", parameter


def lora_weights(carriers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The LoRA's weights by the keys of an adapter file."""
    # lora_A / lora_B throughout: diffusers' own renaming knows attention only and cannot read the mixture it leaves
    return {
        f"{part}.{_full(part, key)}": value.detach()
        for part, model in carriers.items()
        for key, value in get_peft_model_state_dict(model, adapter_name=NAME).items()
    }


def write_lora(folder: Path, carriers: dict[str, nn.Module], config: TrainingConfig) -> Path:
    """Write the LoRA into a folder, with its alpha, base model, trigger words and settings in the metadata.

    They name no folder of this machine: of the base model and the data their names or Hub ids.
    """
    weights = lora_weights(carriers)
    base = config.pretrained_model_name_or_path or world().model
    told = {
        key: public_name(value) if isinstance(value, str) else value
        for key, value in config.settings.items()
    }
    about = {
        "base_model": public_name(base),
        "lorabook_version": lorabook.__version__,
        "training": json.dumps(told),
    }
    if prompt := getattr(config, "instance_prompt", None):
        about |= {"instance_prompt": prompt, "trigger_words": json.dumps([prompt])}
    about = outgoing(about)
    settings = {
        part: model.peft_config[NAME].to_dict()
        | {"base_model_name_or_path": None}  # a path on this machine
        for part, model in carriers.items()
    }
    adapter = parse(weights, configs=settings)
    if config.output_kohya_format:
        write_adapter(folder / KOHYA_NAME, to_kohya(adapter), config={}, about=about)
    return write_adapter(
        folder / WEIGHT_NAME, to_diffusers(adapter)[0], config=settings, about=about
    )


def _full(part: str, key: str) -> str:
    """The key with `text_model.` before it, which transformers 5 leaves out and older readers need."""
    return key if part == "unet" or key.startswith("text_model.") else f"text_model.{key}"


def _check_rank(model: nn.Module, names: list[str], rank: int) -> None:
    modules = dict(model.named_modules())
    for name in names:
        weight = modules[name].weight
        most = min(weight.shape[0], math.prod(weight.shape[1:]))
        if rank > most:
            raise ValueError(
                f"rank {rank} is larger than layer {name} of shape {tuple(weight.shape)}, whose rank is at "
                f"most {most}; give a rank up to {most}"
            )
