"""Trains the ready adapters with lorabook's own training: python data/make/train_adapters.py [NAME …]"""
import sys
from pathlib import Path

import lorabook as lb

ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"
SHARED = dict(pretrained_model_name_or_path="tiny-sd", lr_scheduler="cosine", lr_warmup_steps=20, train_batch_size=8,
              validation_split=0.1, seed=0)
STYLES = {
    "creatures": dict(rank=16, target="all", learning_rate=2e-3, max_train_steps=400),
    "ink": dict(rank=8, target="all", learning_rate=2e-3, max_train_steps=240),
    "mosaic": dict(rank=4, target="all", learning_rate=2e-3, max_train_steps=300),
}
CARD = """# The adapter «{name}»

A LoRA for [tiny-sd](../../tiny-sd/README.md), trained on [{name}](../../{name}/README.md): rank {rank}, target
`{target}`. Validation loss at fixed noise, on the tenth of the images kept out: {first:.3f} before, {last:.3f} after.

- **Licence:** CC0-1.0. **Author:** the lorabook project.
- **Made by** `python data/make/train_adapters.py {name}`, which runs

      {command}

- **Limits:** for tiny-sd only.
- **Used in** notebook 00, and wherever the book needs a ready adapter.
"""


def train(name: str) -> None:
    """Train one style's adapter and write its card."""
    folder, settings = ADAPTERS / name, STYLES[name]
    config = lb.TextToImageConfig(**SHARED, **settings, dataset_name=name, output_dir=f"data/adapters/{name}")
    run = lb.train_text_to_image(config)
    print(name, run)
    (folder / "README.md").write_text(CARD.format(
        name=name, rank=config.rank, target=config.target, command=config.command,
        first=run.validation_losses[0], last=run.validation_losses[-1]))


if __name__ == "__main__":
    for name in sys.argv[1:] or STYLES:
        train(name)
