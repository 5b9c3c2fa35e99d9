"""Adapter files of every form, written by other libraries or by the forms' own formulas, with the
picture they must give.
"""

import logging
from importlib.metadata import version as version_of
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [
    *ATTENTION,
    "proj_in",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
RANK, ALPHA = 4, 2.0


def draw(pipe) -> torch.Tensor:
    """One picture in three steps, (1, 3, 64, 64)."""
    return pipe(
        "a red cat",
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="pt",
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    ).images


def parts_of(pipe) -> dict[str, torch.nn.Module]:
    """The models that carry adapters, by component."""
    return {
        part: getattr(pipe, part)
        for part in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, part, None)
    }


def add_random(pipe, targets=ATTENTION, *, text=True, **config) -> dict[str, torch.Tensor]:
    """Put a random LoRA on a pipeline by PEFT itself; returns its weights by diffusers' keys."""
    torch.manual_seed(1)
    weights = {}
    for part, model in parts_of(pipe).items():
        if part == "unet" or text:
            model.add_adapter(
                LoraConfig(
                    r=RANK,
                    lora_alpha=ALPHA,
                    init_lora_weights=False,
                    target_modules=targets if part == "unet" else TEXT,
                    **config,
                ),
                "random",
            )
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if ".lora_magnitude" in name:
                        value.mul_(1 + 0.2 * torch.rand_like(value))
                    elif ".lora_" in name:
                        value.normal_(std=0.1)
            weights |= {
                f"{part}.{name_in_files(part, key)}": value.detach().clone()
                for key, value in get_peft_model_state_dict(model, adapter_name="random").items()
            }
    return weights


def name_in_files(part: str, key: str) -> str:
    return key if part == "unet" or key.startswith("text_model.") else f"text_model.{key}"


def diffusers_now(pipe, folder: Path):
    add_random(pipe, ALL)
    layers, metadata = {}, {}
    for part, model in parts_of(pipe).items():
        layers[f"{part}_lora_layers"] = {
            name_in_files(part, key): value
            for key, value in get_peft_model_state_dict(model, adapter_name="random").items()
        }
        metadata[f"{part}_lora_adapter_metadata"] = model.peft_config["random"].to_dict()
    type(pipe).save_lora_weights(folder, **layers, **metadata)
    return folder


def diffusers_before_peft(pipe, folder: Path):
    """Attention processors: attn1.processor.to_q_lora.down, and in text encoders
    q_proj.lora_linear_layer.down.
    """
    weights, old = add_random(pipe), {}
    for key, value in weights.items():
        module, half = key.rsplit(".lora_", 1)
        head, last = module.removesuffix(".0").rsplit(".", 1)
        ending = "down.weight" if half.startswith("A") else "up.weight"
        value = value * ALPHA / RANK if half.startswith("B") else value  # these files know no alpha
        if key.startswith("unet."):
            old[f"{head}.processor.{last}_lora.{ending}"] = value
        else:
            old[f"{module}.lora_linear_layer.{ending}"] = value
    save_file(old, folder / "pytorch_lora_weights.safetensors")
    return folder


def bare_keys(pipe, folder: Path):
    """Keys without «unet.», and no text encoders, as `unet.save_attn_procs` wrote them."""
    weights = add_random(pipe, text=False)
    old = {
        key.removeprefix("unet.").replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        * (ALPHA / RANK if "lora_B" in key else 1)
        for key, value in weights.items()
    }
    save_file(old, folder / "bare.safetensors")
    return folder / "bare.safetensors"


def text_without_text_model(pipe, folder: Path):
    weights = add_random(pipe)
    save_file(
        {
            key.replace("text_model.", ""): value * (ALPHA / RANK if "lora_B" in key else 1)
            for key, value in weights.items()
        },
        folder / "short.safetensors",
    )
    return folder / "short.safetensors"


def peft_folder(pipe, folder: Path):
    """PEFT's own save_pretrained, a folder for each component."""
    torch.manual_seed(1)
    for part, model in parts_of(pipe).items():
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                init_lora_weights=False,
                use_rslora=True,
                target_modules=ALL if part == "unet" else TEXT,
            ),
        )
        with torch.no_grad():
            for name, value in model.named_parameters():
                if ".lora_" in name:
                    value.normal_(std=0.1)
        wrapped.save_pretrained(folder / part)
    return folder


def peft_dora(pipe, folder: Path):
    add_random(pipe, [*ATTENTION, "conv1"], use_dora=True)
    for part, model in parts_of(pipe).items():
        save_file(
            {
                f"base_model.model.{key}": value
                for key, value in get_peft_model_state_dict(model, adapter_name="random").items()
            },
            _made(folder / part) / "adapter_model.safetensors",
        )
        model.peft_config["random"].save_pretrained(folder / part)
    return folder


def kohya(pipe, folder: Path):
    """Kohya's keys by their formula, convolutions too (LoCon)."""
    save_file(
        kohya_weights(add_random(pipe, ALL), large=hasattr(pipe, "text_encoder_2")),
        folder / "kohya.safetensors",
    )
    return folder / "kohya.safetensors"


def kohya_by_stability_names(pipe, folder: Path):
    """The UNet's blocks as Stability's code counts them, as sd-scripts writes them for SDXL."""
    weights = kohya_weights(add_random(pipe, ALL), large=hasattr(pipe, "text_encoder_2"))
    save_file(
        {stability_name(key, len(pipe.unet.down_blocks)): value for key, value in weights.items()},
        folder / "sgm.safetensors",
    )
    return folder / "sgm.safetensors"


def kohya_weights(weights: dict, *, large: bool) -> dict:
    """Weights by diffusers' keys, by Kohya's."""
    prefix = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if large else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    found = {}
    for key, value in weights.items():
        part, rest = key.split(".", 1)
        module, half = rest.rsplit(".lora_", 1)
        stem = f"{prefix[part]}_{module.replace('.', '_')}"
        found[f"{stem}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = value.half()
        found[f"{stem}.alpha"] = torch.tensor(ALPHA).half()
    return found


def stability_name(key: str, blocks: int) -> str:
    """Kohya's key with the block as the original code numbers it: two resnets and a sampler make
    three places.
    """
    import re

    if found := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(\w+?)_(\d+)_(.+)", key):
        side, block, part, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if side == "down":
            place = 1 + 3 * block + (2 if part == "downsamplers" else index)
            inner = (
                "0_op" + rest.removeprefix("conv")
                if part == "downsamplers"
                else f"{int(part == 'attentions')}_{rest}"
            )
            return f"lora_unet_input_blocks_{place}_{_old_resnet(inner)}"
        place = 3 * block + (2 if part == "upsamplers" else index)
        has_attention = part != "upsamplers" or (block > 0 if blocks == 4 else block < blocks - 1)
        inner = (
            f"{1 + has_attention}_{rest}"
            if part == "upsamplers"
            else f"{int(part == 'attentions')}_{rest}"
        )
        return f"lora_unet_output_blocks_{place}_{_old_resnet(inner)}"
    if found := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", key):
        number = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"lora_unet_middle_block_{number}_{_old_resnet(found[3])}"
    return key


def _old_resnet(name: str) -> str:
    for ours, theirs in (
        ("time_emb_proj", "emb_layers_1"),
        ("conv_shortcut", "skip_connection"),
        ("conv1", "in_layers_2"),
        ("conv2", "out_layers_3"),
    ):
        name = name.replace(ours, theirs)
    return name


def lycoris(algo: str, **told):
    """A writer of files by the lycoris-lora package itself, whose own forward draws the picture."""

    def write(pipe, folder: Path):
        from lycoris.config import PRESET
        from lycoris.kohya import create_network

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        PRESET["blocks"] = {
            "enable_conv": True,
            "unet_target_name": [],
            "text_encoder_target_name": [],
            "text_encoder_target_module": ["CLIPAttention"],
            "unet_target_module": [
                "Transformer2DModel",
                "ResnetBlock2D",
                "Downsample2D",
                "Upsample2D",
            ],
        }
        texts = (
            [pipe.text_encoder, pipe.text_encoder_2]
            if hasattr(pipe, "text_encoder_2")
            else pipe.text_encoder
        )
        torch.manual_seed(2)
        network = create_network(
            1.0,
            RANK,
            ALPHA,
            pipe.vae,
            texts,
            pipe.unet,
            conv_dim=RANK,
            conv_alpha=ALPHA,
            algo=algo,
            preset="blocks",
            **told,
        )
        network.apply_to(texts, pipe.unet, True, True)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name.endswith("dora_scale"):
                    value.mul_(1 + 0.2 * torch.rand_like(value))
                elif algo != "full":
                    value.normal_(std=0.25 if "hada" in name else 0.1)
                elif name.endswith("weight"):
                    value.add_(0.02 * torch.randn_like(value))
        network.save_weights(
            str(folder / f"{algo}.safetensors"),
            torch.float32,
            {"ss_output_name": f"{algo} of lycoris"},
        )
        pipe.reference = network  # keeps its forward alive
        return folder / f"{algo}.safetensors"

    return write


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


WRITERS = {
    "diffusers": diffusers_now,
    "diffusers before PEFT": diffusers_before_peft,
    "keys without unet.": bare_keys,
    "keys without text_model.": text_without_text_model,
    "PEFT folder, rsLoRA": peft_folder,
    "PEFT DoRA": peft_dora,
    "Kohya and LoCon": kohya,
    "Kohya by Stability's names": kohya_by_stability_names,
    "LyCORIS LoCon, Tucker": lycoris("locon", use_tucker=True),
    "LyCORIS DoRA": lycoris("locon", dora_wd=True),
    "LyCORIS LoHa": lycoris("loha"),
    "LyCORIS LoHa, Tucker": lycoris("loha", use_tucker=True),
    "LyCORIS LoHa with DoRA by input": lycoris("loha", dora_wd=True, wd_on_output=False),
    "LyCORIS LoKr": lycoris("lokr", factor=4),
    "LyCORIS LoKr, both halves low": lycoris("lokr", decompose_both=True),
    "LyCORIS LoKr, full matrices": lycoris("lokr", full_matrix=True),
    "LyCORIS full": lycoris("full"),
}
LYCORIS = Version(version_of("lycoris-lora"))
# 4.0.0 takes the layers' weights for "full" and cannot draw any more
WRITTEN_HERE = [name for name in WRITERS if name != "LyCORIS full" or Version("4.1") <= LYCORIS]


def plain(folder: str) -> DiffusionPipeline:
    """A fresh pipeline without progress bars."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules_of(pipe):
    kinds = torch.nn.Linear, torch.nn.Conv2d
    parts = {
        part: model
        for part in ("unet", "text_encoder", "text_encoder_2")
        if (model := getattr(pipe, part, None)) is not None
    }
    return {
        part: [name for name, module in model.named_modules() if isinstance(module, kinds)]
        for part, model in parts.items()
    }
