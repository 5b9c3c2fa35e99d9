"""Trains the ready adapters with lorabook's own training: python data/make/train_adapters.py [NAME
…]
"""

import shutil
import sys
from pathlib import Path

import lorabook as lb

ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"
SHARED = dict(
    pretrained_model_name_or_path="tiny-sd",
    lr_scheduler="cosine",
    lr_warmup_steps=20,
    train_batch_size=8,
    validation_split=0.1,
    seed=0,
)
STYLES = {
    "creatures": dict(rank=16, target="all", learning_rate=2e-3, max_train_steps=400),
    "ink": dict(rank=8, target="all", learning_rate=2e-3, max_train_steps=240),
    "mosaic": dict(rank=4, target="all", learning_rate=2e-3, max_train_steps=300),
}
SUBJECT = dict(
    pretrained_model_name_or_path="tiny-sd",
    instance_data_dir="subjects/patch_cat",
    rank=8,
    target="all",
    instance_prompt="a drawing of sks cat",
    learning_rate=2e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=0,
    train_batch_size=4,
    max_train_steps=300,
    seed=0,
)
TEXT = dict(train_text_encoder=True, text_encoder_lr=3e-4)
PRIOR = dict(
    with_prior_preservation=True,
    class_prompt="a drawing of a cat",
    class_data_dir="build/class/cat",
    num_class_images=60,
)
SUBJECTS = {
    "patch_cat": SUBJECT | TEXT | PRIOR,
    "patch_cat_no_prior": SUBJECT | TEXT,
    "patch_cat_no_text": SUBJECT | PRIOR,
    "striped_boat": SUBJECT
    | PRIOR
    | dict(
        instance_data_dir="subjects/striped_boat",
        instance_prompt="a drawing of sks boat",
        class_prompt="a drawing of a boat",
        class_data_dir="build/class/boat",
    ),
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
SUBJECT_CARD = """# The adapter «{name}»

A DreamBooth LoRA for [tiny-sd](../../tiny-sd/README.md), trained on [{subject}](../../subjects/README.md): rank {rank},
target `{target}`, {prior} prior preservation, text encoder {text}. Its words: «{trigger}».

- **Licence:** CC0-1.0. **Author:** the lorabook project.
- **Made by** `python data/make/train_adapters.py {name}`, which runs

      {command}

- **Limits:** for tiny-sd only; five pictures, seen from the front.
- **Used in** notebook 04.
"""


def train(name: str) -> None:
    """Train one style's adapter and write its card."""
    folder, settings = ADAPTERS / name, STYLES[name]
    config = lb.TextToImageConfig(
        **SHARED, **settings, dataset_name=name, output_dir=f"build/adapters/{name}"
    )
    run = lb.train_text_to_image(config)
    print(name, run)
    shutil.copy(run.adapter, folder)
    (folder / "README.md").write_text(
        CARD.format(
            name=name,
            rank=config.rank,
            target=config.target,
            command=config.command,
            first=run.validation_losses[0],
            last=run.validation_losses[-1],
        )
    )


def train_subject(name: str) -> None:
    """Train one subject's adapter and write its card."""
    folder = ADAPTERS / name
    config = lb.DreamBoothConfig(
        **SUBJECTS[name], report_to="none", output_dir=f"build/adapters/{name}"
    )
    run = lb.train_dreambooth(config)
    print(name, run)
    folder.mkdir(exist_ok=True)
    shutil.copy(run.adapter, folder)
    subject = Path(config.instance_data_dir).name
    (folder / "README.md").write_text(
        SUBJECT_CARD.format(
            name=name,
            subject=subject,
            rank=config.rank,
            target=config.target,
            command=config.command,
            trigger=config.instance_prompt,
            text="trained too" if config.train_text_encoder else "frozen",
            prior="with" if config.with_prior_preservation else "without",
        )
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or (*STYLES, *SUBJECTS):
        train(name) if name in STYLES else train_subject(name)
