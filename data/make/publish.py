"""Puts a trained pipeline into data/tiny-sd, its UNet in half precision, with a contact sheet:

python data/make/publish.py TRAINED/pipeline
"""

import re
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import lorabook as lb
from judge import generated
from make_tokenizer import add_older_files
from world import COLORS, KINDS, PLACES, caption

TINY_SD = Path(__file__).resolve().parent.parent / "tiny-sd"


def contact_sheet(pipe) -> lb.ImageGrid:
    """Every kind in every place; colors and looks take turns. Nothing is chosen by hand."""
    colors, triples = list(COLORS), []
    for row, place in enumerate(PLACES):
        triples += [
            (kind, colors[(3 * row + column) % len(colors)], place)
            for column, kind in enumerate(KINDS)
        ]
    images = generated(pipe, triples)
    width = len(KINDS)
    return lb.ImageGrid(
        [images[i : i + width] for i in range(0, len(images), width)],
        list(KINDS),
        list(PLACES),
        "tiny-sd: 15 steps, guidance 4, seeds 0, 1, 2 …",
    )


def looks(pipe) -> lb.ImageGrid:
    """The same things plain, outlined, and smiling."""
    styles = ({}, {"outlined": True}, {"smiling": True})
    prompts = [
        [
            caption(kind, color, "a white background", **style)
            for kind, color in (
                ("star", "yellow"),
                ("house", "red"),
                ("mushroom", "purple"),
                ("car", "blue"),
            )
        ]
        for style in styles
    ]
    return lb.ImageGrid(
        [lb.sweep(pipe, columns={"prompt": row}).images[0] for row in prompts],
        prompts[0],
        ["plain", "with a black outline", "smiling"],
    )


def name_as_all_read(folder: Path) -> None:
    """The text encoder's keys with `text_model.`, which every transformers reads; from 5.6 on it
    writes none.
    """
    file = folder / "model.safetensors"
    weights = {
        f"text_model.{key.removeprefix('text_model.')}": weight
        for key, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    trained = StableDiffusionPipeline.from_pretrained(sys.argv[1])
    trained.unet.half()
    trained.save_pretrained(TINY_SD)
    name_as_all_read(TINY_SD / "text_encoder")
    add_older_files(TINY_SD / "tokenizer")
    for config in (TINY_SD / "model_index.json", *TINY_SD.glob("*/config.json")):
        config.write_text(re.sub(r'\n *"_name_or_path": "[^"]*",', "", config.read_text()))
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=torch.float32)
    contact_sheet(pipe).save(TINY_SD / "contact_sheet.png")
    looks(pipe).save(TINY_SD / "looks.png")
