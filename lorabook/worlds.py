"""The two worlds a notebook can run in, and their defaults: the bundled models, and models from the
Hub.
"""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class World:
    """What a notebook or a call assumes when it is told nothing."""

    name: str
    model: str  # a bundled name or a Hub id, as are the adapters below
    data: str
    judge: str  # the CLIP model of `metrics`
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    rank: int
    target: str
    learning_rate: float
    train_batch_size: int
    max_train_steps: int
    validation_split: float
    mixed_precision: str
    prompts: tuple[str, ...]  # they suit an adapter that was trained on `data`
    adapter: str  # this and the next are ready adapters, each with a prompt for what it knows
    adapter_prompt: str
    style: str
    style_prompt: str
    style_plain_prompt: str
    pet: str  # known by a rare word, as is the thing
    pet_prompt: str
    thing: str
    thing_prompt: str
    second_style: str
    blend_prompt: str  # asks for `adapter` and `style` together
    subject: str  # the images for DreamBooth; what follows says how it learns
    instance_prompt: str
    class_prompt: str
    subject_prompts: tuple[str, ...]
    subject_learning_rate: float
    subject_text_encoder_lr: float
    subject_train_steps: int
    as_told: bool  # whether images come out as the notebooks' text says, so that it is asserted


BUNDLED = World(
    name="bundled",
    model="tiny-sd",
    data="creatures",
    judge="tiny-clip",
    resolution=64,
    num_inference_steps=15,
    guidance_scale=4.0,
    rank=16,
    target="all",
    learning_rate=2e-3,
    train_batch_size=8,
    max_train_steps=300,
    validation_split=0.1,
    mixed_precision="no",
    prompts=(
        "a cartoon blue creature with wings",
        "a cartoon red creature with horns",
        "a drawing of a green cat on a white background",
    ),
    adapter="creatures",
    adapter_prompt="a cartoon purple creature with horns and wings",
    style="ink",
    style_prompt="an ink drawing of a bird",
    style_plain_prompt="a drawing of a bird",
    pet="patch_cat",
    pet_prompt="a drawing of sks cat",
    thing="striped_boat",
    thing_prompt="a drawing of sks boat",
    second_style="mosaic",
    blend_prompt="an ink drawing of a creature with horns and wings",
    subject="subjects/patch_cat",
    instance_prompt="a drawing of sks cat",
    class_prompt="a drawing of a cat",
    subject_prompts=(
        "a drawing of sks cat on a sandy beach",
        "a drawing of a black cat",
        "a drawing of a red boat",
    ),
    subject_learning_rate=2e-3,
    subject_text_encoder_lr=3e-4,
    subject_train_steps=300,
    as_told=True,
)

HUB = World(
    name="hub",
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    data="reach-vb/pokemon-blip-captions",
    judge="openai/clip-vit-base-patch32",
    resolution=512,
    num_inference_steps=25,
    guidance_scale=7.5,
    rank=4,
    target="attention",
    learning_rate=1e-4,
    train_batch_size=1,
    max_train_steps=1500,
    validation_split=0.02,
    mixed_precision="fp16",
    prompts=("a cartoon blue creature with wings", "a red creature with horns", "yoda"),
    adapter="Norod78/SD15-Rubber-Duck-LoRA",
    adapter_prompt="a rubber duck wearing a crown",
    style="wooyvern/sd-1.5-dark-fantasy-1.1",
    style_prompt="a dark castle",
    style_plain_prompt="a castle",
    pet="Norod78/sd15-megaphone-lora",
    pet_prompt="a megaphone",
    thing="Norod78/sd15-megaphone-lora",
    thing_prompt="a megaphone",
    second_style="Norod78/sd15-megaphone-lora",
    blend_prompt="a rubber duck in a dark castle",
    subject="diffusers/dog-example",
    instance_prompt="a photo of sks dog",
    class_prompt="a photo of a dog",
    subject_prompts=(
        "a photo of sks dog in a bucket",
        "a photo of a black dog",
        "a photo of a red boat",
    ),
    subject_learning_rate=1e-4,
    subject_text_encoder_lr=1e-5,
    subject_train_steps=500,
    as_told=False,
)


def world(name: str | None = None) -> World:
    """The defaults of a world.

    Args:
        name: "bundled" or "hub"; None picks "hub" where there is a CUDA GPU, else "bundled".

    Raises:
        ValueError: For another name.
    """
    if name is None:
        import torch

        return HUB if torch.cuda.is_available() else BUNDLED
    for candidate in (BUNDLED, HUB):
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown world {name!r}; the worlds are: bundled, hub")


def bundled(name: str) -> Path | None:
    """The folder of a bundled model, image set or subject, or None where there is no such thing.

    Args:
        name: "tiny-sd", "creatures", "subjects/patch_cat" …, from any working directory.
    """
    folder = DATA / name
    inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
    return folder if inside and name != "." and folder.is_dir() else None
