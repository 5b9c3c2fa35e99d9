"""The world with a GPU, as far as it goes without one and without a Hub: its model, data and
adapters as local folders.
"""

import json
import random
import shutil
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import unfold
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel

import lorabook as lb
from styles import creature, patch_cat

SIDE = 128  # pixels; SD 1.5's is 512
PNDM = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    steps_offset=1,
    skip_prk_steps=True,
    set_alpha_to_one=False,
)  # word for word SD 1.5's
DOGS = ("9M0tSjb-cpA", "Id1DBHv4fbg", "bQaAJCbNq3g", "brFsZ7qszSY", "eoqnr8ikwFE")


def hub_world(folder: Path) -> dict:
    """Make what the Hub would give, in miniature; returns the fields of HUB that this changes, and
    the few steps of a test.

    No field of another kind is touched: prompts, ranks, what is trained, and the scheduler's
    defaults are HUB's own.
    """
    pipe = sd15(folder / "stable-diffusion-v1-5")
    pokemon(folder / "pokemon-blip-captions")
    dogs(folder / "dog-example")
    shutil.copytree(lb.bundled("tiny-clip"), folder / "clip-vit-base-patch32")
    names = ("SD15-Rubber-Duck-LoRA", "sd-1.5-dark-fantasy-1.1", "sd15-megaphone-lora")
    duck, dark, phone = (folder / name for name in names)
    kohya(pipe, duck / "SD15_Rubber_Duck_000002000.safetensors", rank=16, seed=1)
    diffusers_form(pipe, dark / "pytorch_lora_weights.safetensors", rank=32, seed=2)
    kohya(pipe, phone / "megaphone-v1 (final).safetensors", rank=16, seed=3)
    return {
        "model": str(folder / "stable-diffusion-v1-5"),
        "data": str(folder / "pokemon-blip-captions"),
        "subject": str(folder / "dog-example"),
        "judge": str(folder / "clip-vit-base-patch32"),
        "resolution": SIDE,
        "adapter": str(duck),
        "style": str(dark),
        "pet": str(phone),
        "thing": str(phone),
        "second_style": str(phone),
        "mixed_precision": "no",  # a CPU cannot train in fp16
        "num_inference_steps": 2,
        "max_train_steps": 6,
        "subject_train_steps": 4,
        "validation_split": 0.1,
    }  # of fewer pictures


def sd15(folder: Path) -> StableDiffusionPipeline:
    """A folder like SD 1.5's on the Hub: its parts, blocks and schedule; narrow, and of random
    weights.

    Only the last convolutions know something, so that noise goes down a little and pictures have
    colours.
    """
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(lb.bundled("configs/sd15/unet"))
    unet = UNet2DConditionModel.from_config(
        config, block_out_channels=(32, 64, 64, 64), cross_attention_dim=64, sample_size=SIDE // 8
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=16,
        sample_size=SIDE,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    base = lb.load_pipeline("tiny-sd", device="cpu")
    words = dict(
        vocab_size=base.tokenizer.vocab_size,
        bos_token_id=base.text_encoder.config.bos_token_id,
        eos_token_id=base.text_encoder.config.eos_token_id,
    )
    width = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    seen = dict(width, image_size=32, patch_size=16)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**words, **width)),
        tokenizer=base.tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**PNDM),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        safety_checker=StableDiffusionSafetyChecker(
            CLIPConfig(text_config=width, vision_config=seen, projection_dim=32)
        ),
    )
    taught(pipe)
    pipe.save_pretrained(folder)
    as_on_the_hub(folder / "tokenizer")
    return pipe


@torch.no_grad()
def taught(pipe) -> None:
    """Solve the UNet's and the decoder's last convolution for what they should give on a few
    pictures.
    """
    pixels = torch.stack([pipe.image_processor.preprocess(image)[0] for image in creatures(8)])
    mean = pipe.vae.encode(pixels).latent_dist.mean
    pipe.vae.register_to_config(scaling_factor=1 / mean.std().item())
    latents, noise, text = (
        mean / mean.std(),
        torch.randn(mean.shape),
        torch.randn(len(mean), 77, 64),
    )
    noisy = pipe.scheduler.add_noise(
        latents, noise, times := torch.linspace(50, 950, len(mean)).long()
    )
    solve(pipe.unet.conv_out, noise, lambda: pipe.unet(noisy, times, text))
    solve(pipe.vae.decoder.conv_out, pixels, lambda: pipe.vae.decode(mean))


def solve(last: nn.Conv2d, wanted: torch.Tensor, call) -> None:
    """Give a model's last convolution the weights that come nearest to what is wanted of this call."""
    inputs = []
    hook = last.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    call()
    hook.remove()
    patches = unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    found = torch.linalg.lstsq(rows, wanted.permute(0, 2, 3, 1).flatten(0, 2)).solution
    last.weight.copy_(found[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(found[-1])


def as_on_the_hub(folder: Path) -> None:
    """Write a tokenizer in SD 1.5's files: a vocabulary and its merges."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n"
    )
    (folder / "tokenizer.json").unlink()


def creatures(count: int) -> list:
    """Creatures of the tests' seed, larger than they were drawn."""
    return [creature(rng)[0].resize((SIDE, SIDE)) for rng in map(random.Random, range(count))]


def pokemon(folder: Path) -> None:
    """A data set as the Hub keeps reach-vb/pokemon-blip-captions: a parquet file with `image` and
    `text`.
    """
    texts = [creature(random.Random(seed))[1].replace("creature", "pokemon") for seed in range(24)]
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": creatures(24), "text": texts}, features=kinds)
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data" / "train-00000-of-00001-566cc9b19d7203f8.parquet")


def dogs(folder: Path) -> None:
    """Five jpegs of five sizes, as in diffusers/dog-example."""
    folder.mkdir()
    for number, name in enumerate(DOGS):
        picture = patch_cat("a white background", random.Random(number))
        picture.resize((150 + 30 * number, 210 - 10 * number)).save(
            folder / f"alvan-nee-{name}-unsplash.jpeg"
        )


def halves(
    pipe, rank: int, seed: int, ends: tuple[str, ...]
) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The down and up weights of a LoRA by component and module; as after training, the first
    directions are strongest.
    """
    torch.manual_seed(seed)
    strength, found = 0.7 ** torch.arange(rank), {"unet": {}, "text_encoder": {}}
    for part, modules in found.items():
        for name, layer in getattr(pipe, part).named_modules():
            if name.endswith(ends) and isinstance(layer, (nn.Linear, nn.Conv2d)):
                out, width = layer.weight.shape[:2]
                up, down = torch.randn(out, rank) * strength, torch.randn(rank, width) / width**0.5
                square = layer.weight.shape[2:]
                modules[name] = (
                    down.reshape(rank, width, *square),
                    0.15 * up.reshape(out, rank, *square),
                )
    return found


def kohya(pipe, path: Path, *, rank: int, seed: int) -> None:
    """A file as sd-scripts writes it: attention and feed-forward layers of UNet and text encoder,
    in half precision.
    """
    ends = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "net.0.proj",
        "net.2",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    )
    weights = {}
    for part, modules in halves(pipe, rank, seed, ends).items():
        for name, (down, up) in modules.items():
            name = (
                name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            )
            stem = f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}"
            weights |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            weights[f"{stem}.alpha"] = torch.tensor(rank / 2)
    told = {
        "ss_base_model_version": "sd_v1-5",
        "ss_network_module": "networks.lora",
        "ss_output_name": path.stem,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank / 2),
    }
    path.parent.mkdir()
    save_file({key: value.half().contiguous() for key, value in weights.items()}, path, told)


def diffusers_form(pipe, path: Path, *, rank: int, seed: int) -> None:
    """A file as diffusers' training scripts wrote it: the UNet's attention, no metadata."""
    path.parent.mkdir()
    weights = {}
    for name, (down, up) in halves(pipe, rank, seed, ("to_q", "to_k", "to_v", "to_out.0"))[
        "unet"
    ].items():
        weights |= {
            f"unet.{name}.lora.down.weight": down.contiguous(),
            f"unet.{name}.lora.up.weight": up.contiguous(),
        }
    save_file(weights, path, {"format": "pt"})
