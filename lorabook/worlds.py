"""The two worlds a notebook can run in: the bundled models, and models from the Hub."""

import tomllib
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


def _read(name: str) -> World:
    fields = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))[name]
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return World(name, **fields | lists)


BUNDLED, HUB = _read("bundled"), _read("hub")


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
