"""Train a text-to-image LoRA on captioned images, in a notebook or on the command line.

accelerate launch --quiet -m lorabook.training.text_to_image --train_data_dir=… takes the flags of
diffusers' train_text_to_image_lora.py and train_text_to_image_lora_sdxl.py.
"""

from lorabook.images import load_captioned_images
from lorabook.training.config import TextToImageConfig
from lorabook.training.flags import run_command_line
from lorabook.training.run import TrainingRun, fit, split
from lorabook.training.setup import check_early, set_up
from lorabook.training.trainer import TrainingData
from lorabook.worlds import world


def train_text_to_image(config: TextToImageConfig) -> TrainingRun:
    """Train a LoRA on captioned images; write it to `output_dir/pytorch_lora_weights.safetensors`.

    Beside it are `checkpoint-<step>/`, which `resume_from_checkpoint` goes on from, and
    `validation/` with images. A stop button's interrupt saves and returns the run so far.

    Args:
        config: Model, images and settings.

    Returns:
        A TrainingRun, which shows itself.

    Raises:
        FileNotFoundError, ValueError: In one sentence and before anything is trained or written,
            where model, images or settings cannot be used.
        FloatingPointError: If the loss is no longer finite, with the last good adapter written.

    Source: Hu et al. 2021, arXiv:2106.09685; diffusers' examples/text_to_image.
    """
    check_early(config)
    images = load_captioned_images(
        config.train_data_dir or config.dataset_name or world().data,
        caption_column=config.caption_column,
        image_column=config.image_column,
        config_name=config.dataset_config_name,
        max_samples=config.max_train_samples,
        allow_empty_captions=config.allow_empty_captions,
        cache_dir=config.cache_dir,
    )
    images, held_out = split(images, config)
    data = TrainingData(images, (len(images),), held_out=held_out)
    with set_up(config) as setup:
        return fit(setup, data)


if __name__ == "__main__":
    run_command_line(TextToImageConfig, train_text_to_image)
