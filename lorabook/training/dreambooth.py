"""Train a DreamBooth LoRA on a few pictures of one subject, in a notebook or on the command line.

accelerate launch --quiet -m lorabook.training.dreambooth --instance_data_dir=… takes the flags of diffusers'
train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py.
"""

import datasets

from lorabook.images import load_instance_images
from lorabook.training.class_images import class_images
from lorabook.training.config import DreamBoothConfig
from lorabook.training.flags import run_command_line
from lorabook.training.run import TrainingRun
from lorabook.training.setup import Setup, check_early, set_up
from lorabook.training.trainer import TrainingData, check_batch, fit, split


def train_dreambooth(config: DreamBoothConfig) -> TrainingRun:
    """Train a LoRA on pictures of one subject and write it to `output_dir/pytorch_lora_weights.safetensors`.

    With `with_prior_preservation` each batch also holds pictures of the subject's class, drawn by the base model, so
    that the class stays what it was. Checkpoints, pictures and interrupts are as in `train_text_to_image`.

    Args:
        config: model, pictures, prompts and settings.
    Returns: a TrainingRun, which shows itself.
    Raises: as `train_text_to_image`.
    Source: Ruiz et al. 2022, arXiv:2208.12242; diffusers' examples/dreambooth.
    """
    source = config.instance_data_dir or config.dataset_name
    if not source:
        raise ValueError("instance_data_dir is missing: give a folder with pictures of the subject")
    if not config.instance_prompt:
        raise ValueError(
            "instance_prompt is missing: give a prompt that names the subject, as in «a photo of sks dog»"
        )
    check_early(config)
    images = load_instance_images(
        source,
        config.instance_prompt,
        caption_column=config.caption_column,
        image_column=config.image_column,
        config_name=config.dataset_config_name,
        **({"cache_dir": config.cache_dir} if config.cache_dir else {}),
    )
    learned, held_out = split(images, config.validation_split)
    check_batch(config, len(learned) * config.repeats)
    setup = set_up(config)
    return fit(setup, _training_data(setup, learned, held_out))


def _training_data(
    setup: Setup, learned: datasets.Dataset, held_out: datasets.Dataset | None
) -> TrainingData:
    """Instance images, and with prior preservation the class images behind them."""
    config = setup.config
    if not config.with_prior_preservation:
        return TrainingData(learned, (len(learned),), held_out=held_out, repeats=config.repeats)
    classes = class_images(setup)
    both = datasets.concatenate_datasets([learned, classes])
    return TrainingData(
        both,
        (len(learned), len(classes)),
        (1.0, config.prior_loss_weight),
        held_out,
        config.repeats,
    )


if __name__ == "__main__":
    run_command_line(DreamBoothConfig, train_dreambooth)
