"""What a training run is told: dataclasses whose fields are the command line's flags."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from lorabook.blocks import TARGETS
from lorabook.training.flags import check, check_numbers, check_types, command, flag, told

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
PREDICTION_TYPES = ("epsilon", "v_prediction")
DATA = ("dataset_name", "train_data_dir", "instance_data_dir")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
WITHOUT_EFFECT = {
    "class_labels_conditioning": "class_labels_conditioning has no effect: it is for DeepFloyd IF's upscaler, which is not trained here",
    "validation_images": "validation_images has no effect: it is for DeepFloyd IF's upscaler, which is not trained here",
    "enable_npu_flash_attention": "enable_npu_flash_attention has no effect: it is for Ascend NPUs; torch picks the attention kernel",
}


@dataclass(frozen=True)
class TrainingConfig:
    """What both kinds of training are told; None means that the model, the data or the method decide."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "base model: folder, bundled name or Hub id; default: the bundled tiny-sd without a GPU, Stable Diffusion 1.5 with one",
    )
    revision: str | None = flag(None, "revision of the base model on the Hub")
    variant: str | None = flag(None, "variant of its weight files, for example fp16")
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another VAE: folder or Hub id (for SDXL one that survives fp16)"
    )
    dataset_name: str | None = flag(None, "images: Hub id or bundled name")
    dataset_config_name: str | None = flag(None, "configuration of the Hub data set")
    image_column: str | None = flag(None, "column of images; found if not given")
    caption_column: str | None = flag(
        None,
        "column of captions; text-to-image finds it if not given, DreamBooth then uses instance_prompt",
    )
    validation_split: float = flag(
        0.0, "share of the images kept out of training to measure the loss on"
    )
    validation_prompt: str | None = flag(None, "prompt of the pictures drawn on the way")
    num_validation_images: int = flag(4, "number of those pictures")
    validation_epochs: int = flag(1, "draw them every so many epochs")
    cache_dir: str | None = flag(None, "where downloads and cached latents are kept")
    cache_latents: bool = flag(
        True, "encode images and prompts once and keep them on disk; off: at every step"
    )
    seed: int | None = flag(None, "seed of everything random; not given: another one each time")
    resolution: int | None = flag(
        None, "side of the training images in pixels; default: the model's own"
    )
    center_crop: bool = flag(
        False, "crop the middle; else a random part where the image is not square"
    )
    image_interpolation_mode: str = flag(
        "lanczos", "how images are resized", choices=INTERPOLATIONS
    )
    train_batch_size: int = flag(16, "images a step on each device")
    num_train_epochs: int = flag(100, "passes over the images, where max_train_steps is not given")
    max_train_steps: int | None = flag(None, "number of optimiser steps")
    gradient_accumulation_steps: int = flag(1, "batches summed before an optimiser step")
    gradient_checkpointing: bool = flag(False, "save memory by computing activations twice")
    compile: bool = flag(
        False, "compile the UNet's transformer blocks: a minute at the start, faster steps on a GPU"
    )
    learning_rate: float | None = flag(1e-4, "learning rate")
    text_encoder_lr: float | None = flag(
        None, "learning rate of the text encoders; default: the UNet's, for SDXL DreamBooth 5e-6"
    )
    scale_lr: bool = flag(False, "multiply the rates by devices, accumulation and batch size")
    lr_scheduler: str = flag("constant", "how the rate changes", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(500, "steps over which the rate rises, where the schedule has such")
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts")
    lr_power: float = flag(1.0, "power of polynomial")
    snr_gamma: float | None = flag(
        None, "weigh the loss by signal to noise, clamped at this (5 is usual)"
    )
    noise_offset: float = flag(0.0, "strength of a constant added to each channel's noise")
    prediction_type: str | None = flag(
        None, "epsilon or v_prediction; default: the model's own", choices=PREDICTION_TYPES
    )
    caption_dropout: float = flag(0.0, "share of captions replaced by an empty one")
    optimizer: str = flag("AdamW", "AdamW or prodigy", choices=("AdamW", "adamw", "prodigy"))
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit states (extra lowbit)")
    adam_beta1: float = flag(0.9, "the optimiser's first beta")
    adam_beta2: float = flag(0.999, "the optimiser's second beta")
    adam_weight_decay: float | None = flag(1e-2, "weight decay")
    adam_weight_decay_text_encoder: float | None = flag(
        None, "weight decay of the text encoders; default: the UNet's, for SDXL DreamBooth 1e-3"
    )
    adam_epsilon: float = flag(1e-8, "the optimiser's epsilon")
    prodigy_beta3: float | None = flag(
        None, "prodigy's third beta; default: the root of the second"
    )
    prodigy_decouple: bool = flag(True, "prodigy: weight decay as in AdamW")
    prodigy_use_bias_correction: bool = flag(True, "prodigy: Adam's bias correction")
    prodigy_safeguard_warmup: bool = flag(
        True, "prodigy: leave the rate out of its estimate while warming up"
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    mixed_precision: str | None = flag(
        None, "precision of the frozen weights", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "let an Ampere GPU or newer multiply in TF32")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers, where it is installed"
    )
    enable_npu_flash_attention: bool = flag(False, "for Ascend NPUs; no effect here")
    dataloader_num_workers: int = flag(0, "processes that read images, where they are not cached")
    rank: int = flag(4, "rank of every adapted layer")
    alpha: float | None = flag(
        None, "alpha: the adapter's output is scaled by alpha / rank; default: equal to rank"
    )
    target: str = flag("attention", "which UNet layers are adapted", choices=tuple(TARGETS))
    target_blocks: list[str] | None = flag(
        None, "adapt only these UNet blocks, as in: down.2 mid up.1"
    )
    use_dora: bool = flag(False, "train DoRA: a magnitude beside the low-rank direction")
    lora_dropout: float = flag(0.0, "dropout on the adapter's input")
    train_text_encoder: bool = flag(False, "adapt the text encoders as well")
    output_dir: str = flag(
        "sd-model-finetuned-lora", "folder for adapter, checkpoints and pictures"
    )
    output_kohya_format: bool = flag(False, "write the adapter with Kohya's keys too")
    checkpointing_steps: int = flag(500, "save a checkpoint every so many steps")
    checkpoints_total_limit: int | None = flag(None, "keep only the newest so many checkpoints")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint's folder, or latest")
    report_to: str = flag(
        "tensorboard", "where numbers and pictures are reported (extra trackers)", choices=TRACKERS
    )
    logging_dir: str = flag("logs", "folder for these reports, inside output_dir")
    push_to_hub: bool = flag(False, "upload the adapter when it is done")
    hub_token: str | None = flag(
        None, "token for that; better: the environment's HF_TOKEN", repr=False
    )
    hub_model_id: str | None = flag(None, "repository for that; default: the name of output_dir")
    local_rank: int = flag(-1, "set by old launchers; no effect, accelerate reads the environment")

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, os.PathLike):  # so that it can stand in the adapter's metadata
                object.__setattr__(self, option.name, os.fspath(value))
            if isinstance(value, tuple):
                object.__setattr__(self, option.name, list(value))
            if option.name in DATA and not isinstance(value, str | os.PathLike | None):
                raise ValueError(
                    f"{option.name} names a folder or data set, and {type(value).__name__} is none; save such "
                    f"pictures, lb.load_captioned_images(…).save_to_disk(folder), and give that folder"
                )
        check_types(self)
        check_numbers(
            self,
            at_least_one=(
                "rank",
                "train_batch_size",
                "num_train_epochs",
                "gradient_accumulation_steps",
                "max_train_steps",
                "resolution",
                "validation_epochs",
                "checkpointing_steps",
                "checkpoints_total_limit",
                "lr_num_cycles",
            ),
            at_least_zero=(
                "lr_warmup_steps",
                "num_validation_images",
                "dataloader_num_workers",
                "noise_offset",
                "adam_weight_decay",
                "adam_weight_decay_text_encoder",
                "lr_power",
            ),
            above_zero=(
                "learning_rate",
                "text_encoder_lr",
                "max_grad_norm",
                "adam_epsilon",
                "snr_gamma",
                "alpha",
            ),
            share=(
                "caption_dropout",
                "lora_dropout",
                "validation_split",
                "adam_beta1",
                "adam_beta2",
                "prodigy_beta3",
            ),
        )
        check(
            self, "seed", self.seed is None or 0 <= self.seed < 2**32, "0 or more and below 2 ** 32"
        )
        if self.hub_token and self.report_to in ("wandb", "all"):
            raise ValueError(
                "hub_token cannot go with report_to wandb, which uploads the command line; set HF_TOKEN instead"
            )
        for name in ("validation_prompt", "output_dir", "hub_model_id"):
            self._check_text(name)
        _check_output(Path(self.output_dir))

    def _check_text(self, name: str) -> None:
        if getattr(self, name) is not None and not getattr(self, name).strip():
            raise ValueError(f"{name} is empty; give it some text or leave it out")

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        return command(self, f"lorabook.training.{self.method}")

    @property
    def settings(self) -> dict:
        """The fields that were given, as plain data; never the token."""
        return told(self)

    @property
    def without_effect(self) -> list[str]:
        """A sentence for each flag that was given and can do nothing here."""
        sentences = [
            sentence for name, sentence in WITHOUT_EFFECT.items() if getattr(self, name, None)
        ]
        if self.local_rank != -1:
            sentences.append(
                "local_rank has no effect: the launcher's environment tells each process its place"
            )
        if self.use_8bit_adam and self.optimizer == "prodigy":
            sentences.append("use_8bit_adam has no effect with optimizer prodigy")
        return sentences


@dataclass(frozen=True)
class TextToImageConfig(TrainingConfig):
    """A text-to-image LoRA training run; names and defaults are those of diffusers' train_text_to_image_lora.py.

    Every field is a flag of `python -m lorabook.training.text_to_image`, and its help says what it does. None means
    that the model or the data decide. Raises ValueError, naming the field, if a value cannot be used.
    """

    train_data_dir: str | None = flag(None, "captioned images: a folder")
    max_train_samples: int | None = flag(None, "use only the first so many images")
    allow_empty_captions: bool = flag(
        False, "train where no image has a caption, on empty ones; else that is an error"
    )
    random_flip: bool = flag(False, "mirror half of the images")
    debug_loss: bool = flag(False, "report the loss of each image by its number")

    method = "text_to_image"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, at_least_one=("max_train_samples",))
        if self.dataset_name and self.train_data_dir:
            raise ValueError("dataset_name and train_data_dir are both given; give one of them")


@dataclass(frozen=True)
class DreamBoothConfig(TrainingConfig):
    """A DreamBooth LoRA training run; names and defaults are those of diffusers' train_dreambooth_lora(_sdxl).py.

    Every field is a flag of `python -m lorabook.training.dreambooth`, and its help says what it does. None means that
    the model or the data decide. Raises ValueError, naming the field, if a value cannot be used.
    """

    instance_data_dir: str | None = flag(None, "pictures of the subject: a folder or bundled name")
    instance_prompt: str | None = flag(
        None, "prompt that names the subject by a rare word, as in: a photo of sks dog"
    )
    class_data_dir: str | None = flag(
        None,
        "pictures of the subject's class: a folder, filled by the model where they are too few",
    )
    class_prompt: str | None = flag(None, "prompt of the class, as in: a photo of a dog")
    with_prior_preservation: bool = flag(
        False, "learn from the class pictures too, so that the class stays itself"
    )
    prior_loss_weight: float = flag(1.0, "weight of the class pictures in the loss")
    num_class_images: int = flag(100, "number of class pictures")
    sample_batch_size: int = flag(4, "class pictures drawn at once")
    prior_generation_precision: str | None = flag(
        None, "precision in which they are drawn", choices=("no", "fp32", "fp16", "bf16")
    )
    repeats: int = flag(1, "times that each instance picture counts in an epoch")
    random_flip: bool = flag(False, "mirror half of the images")
    train_batch_size: int = flag(
        4, "instance images a step on each device; class images come beside them"
    )
    num_train_epochs: int = flag(1, "passes over the images, where max_train_steps is not given")
    validation_epochs: int = flag(50, "draw validation pictures every so many epochs")
    learning_rate: float | None = flag(None, "learning rate; default: 5e-4, for SDXL 1e-4")
    adam_weight_decay: float | None = flag(None, "weight decay; default: 1e-2, for SDXL 1e-4")
    output_dir: str = flag("lora-dreambooth-model", "folder for adapter, checkpoints and pictures")
    tokenizer_name: str | None = flag(None, "another tokenizer: folder or Hub id")
    tokenizer_max_length: int | None = flag(
        None, "tokens that a prompt is filled up to; default: the tokenizer's own"
    )
    text_encoder_use_attention_mask: bool = flag(
        False, "let the text encoder see the prompt without its padding"
    )
    pre_compute_text_embeddings: bool = flag(
        False, "encode prompts once; done anyway where the text encoder is frozen"
    )
    validation_images: list[str] | None = flag(None, "for DeepFloyd IF's upscaler; no effect here")
    class_labels_conditioning: str | None = flag(
        None, "for DeepFloyd IF's upscaler; no effect here"
    )
    do_edm_style_training: bool = flag(
        False, "measure the loss on the denoised latents, weighed as in EDM (Karras et al. 2022)"
    )

    method = "dreambooth"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(
            self,
            at_least_one=(
                "num_class_images",
                "sample_batch_size",
                "repeats",
                "tokenizer_max_length",
            ),
            at_least_zero=("prior_loss_weight",),
        )
        for name in ("instance_prompt", "class_prompt"):
            self._check_text(name)
        if self.dataset_name and self.instance_data_dir:
            raise ValueError("dataset_name and instance_data_dir are both given; give one of them")
        if (self.class_data_dir or self.with_prior_preservation) and not self.class_prompt:
            raise ValueError(
                f"class_prompt is missing: {'class_data_dir' if self.class_data_dir else 'prior preservation'}"
                " needs a prompt that names the class, as in «a photo of a dog»"
            )
        if self.with_prior_preservation and not self.class_data_dir:
            raise ValueError(
                "class_data_dir is missing: prior preservation needs a folder for the class images"
            )
        if self.train_text_encoder and self.pre_compute_text_embeddings:
            raise ValueError(
                "pre_compute_text_embeddings cannot go with train_text_encoder, whose embeddings change; "
                "give one of them"
            )
        if self.do_edm_style_training and self.snr_gamma:
            raise ValueError(
                "snr_gamma cannot go with do_edm_style_training, which weighs the loss itself; give one of them"
            )

    @property
    def without_effect(self) -> list[str]:
        """A sentence for each flag that was given and can do nothing here."""
        given = self.class_prompt and not self.with_prior_preservation
        return super().without_effect + [
            "class_prompt and class_data_dir have no effect without with_prior_preservation"
        ] * bool(given)


def _check_output(folder: Path) -> None:
    """Fail now rather than after training where the output folder cannot be made."""
    if folder.is_file():
        raise ValueError(f"output_dir {str(folder)!r} is a file; give a folder")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"output_dir {str(folder)!r} cannot be made: {there} is a file or may not be written to"
        )
