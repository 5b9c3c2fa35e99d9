"""The settings of a training run: dataclasses whose fields are the command line's flags."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from lorabook.blocks import TARGETS
from lorabook.training.flags import (
    Amount,
    Count,
    CountOrZero,
    Flags,
    Positive,
    Seed,
    Share,
    check_fields,
    flag,
)

INTERPOLATIONS = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
LR_SCHEDULERS = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
PRECISIONS = Literal["no", "fp16", "bf16"]
CLASS_PRECISIONS = Literal["no", "fp32", "fp16", "bf16"]
PREDICTIONS = Literal["epsilon", "v_prediction"]
TRACKERS = Literal["tensorboard", "wandb", "comet_ml", "all", "none"]
SOURCES = ("dataset_name", "train_data_dir", "instance_data_dir")
CONFLICTS = (
    ("pre_compute_text_embeddings", "train_text_encoder", "whose embeddings change"),
    ("snr_gamma", "do_edm_style_training", "which weighs the loss itself"),
)
TEXTS = ("validation_prompt", "output_dir", "hub_model_id", "instance_prompt", "class_prompt")
UPSCALER = "it is for DeepFloyd IF's upscaler, which is not trained here"
WITHOUT_EFFECT = {
    "class_labels_conditioning": UPSCALER,
    "validation_images": UPSCALER,
    "enable_npu_flash_attention": "it is for Ascend NPUs; torch picks the attention kernel",
}


@dataclass(frozen=True)
class TrainingConfig(Flags):
    """What both methods share; None means that the model, the data or the method decide."""

    pretrained_model_name_or_path: str | None = flag(None, "base model: folder, name or Hub id")
    revision: str | None = flag(None, "revision of the base model on the Hub")
    variant: str | None = flag(None, "variant of its weight files, for example fp16")
    pretrained_vae_model_name_or_path: str | None = flag(None, "another VAE: folder or Hub id")
    dataset_name: str | None = flag(None, "images: Hub id or bundled name")
    dataset_config_name: str | None = flag(None, "configuration of the Hub data set")
    image_column: str | None = flag(None, "column of images; default: the first that holds such")
    caption_column: str | None = flag(None, "column of captions; DreamBooth: else instance_prompt")
    validation_split: Share = flag(0.0, "share of the images that only the loss is measured on")
    validation_prompt: str | None = flag(None, "prompt of the images generated on the way")
    num_validation_images: CountOrZero = flag(4, "number of those images")
    validation_epochs: Count = flag(1, "generate them every so many epochs")
    cache_dir: str | None = flag(None, "folder of downloads and of encoded images and prompts")
    cache_latents: bool = flag(True, "encode images and prompts once; off: at every step")
    seed: Seed | None = flag(None, "seed of everything random; default: another one each time")
    resolution: Count | None = flag(None, "side of the images in pixels; default: the model's own")
    center_crop: bool = flag(False, "crop the middle of images that are not square, else anywhere")
    random_flip: bool = flag(False, "mirror half of the images")
    image_interpolation_mode: INTERPOLATIONS = flag("lanczos", "how images are resized")
    train_batch_size: Count = flag(16, "images a step on each device")
    num_train_epochs: Count = flag(100, "passes over the images, without max_train_steps")
    max_train_steps: Count | None = flag(None, "number of optimiser steps")
    gradient_accumulation_steps: Count = flag(1, "batches summed before an optimiser step")
    gradient_checkpointing: bool = flag(False, "save memory by computing activations twice")
    compile: bool = flag(False, "compile the UNet: a minute at the start, faster steps on a GPU")
    learning_rate: Positive | None = flag(1e-4, "learning rate")
    text_encoder_lr: Positive | None = flag(None, "the text encoders' rate; SDXL DreamBooth: 5e-6")
    scale_lr: bool = flag(False, "multiply the rates by devices, accumulation and batch size")
    lr_scheduler: LR_SCHEDULERS = flag("constant", "how the rate changes")
    lr_warmup_steps: CountOrZero = flag(500, "steps over which the rate rises, if it does")
    lr_num_cycles: Count = flag(1, "restarts of cosine_with_restarts")
    lr_power: Amount = flag(1.0, "power of polynomial")
    snr_gamma: Positive | None = flag(None, "weigh the loss by min-SNR, clamped at this (5)")
    noise_offset: Amount = flag(0.0, "strength of a constant added to each channel's noise")
    prediction_type: PREDICTIONS | None = flag(None, "what the UNet predicts, if not its own way")
    caption_dropout: Share = flag(0.0, "share of captions replaced by an empty one")
    optimizer: Literal["AdamW", "adamw", "prodigy"] = flag("AdamW", "AdamW or prodigy")
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit states (extra lowbit)")
    adam_beta1: Share = flag(0.9, "the optimiser's first beta")
    adam_beta2: Share = flag(0.999, "the optimiser's second beta")
    adam_weight_decay: Amount | None = flag(1e-2, "weight decay")
    adam_weight_decay_text_encoder: Amount | None = flag(None, "the text encoders' weight decay")
    adam_epsilon: Positive = flag(1e-8, "the optimiser's epsilon")
    prodigy_beta3: Share | None = flag(None, "prodigy's third beta; default: √ of the second")
    prodigy_decouple: bool = flag(True, "prodigy: weight decay as in AdamW")
    prodigy_use_bias_correction: bool = flag(True, "prodigy: Adam's bias correction")
    prodigy_safeguard_warmup: bool = flag(True, "prodigy: estimate without the warm-up's rate")
    max_grad_norm: Positive = flag(1.0, "gradients are clipped to this norm")
    mixed_precision: PRECISIONS | None = flag(None, "precision of the frozen weights")
    allow_tf32: bool = flag(False, "let an Ampere GPU or newer multiply in TF32")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention by xformers")
    enable_npu_flash_attention: bool = flag(False, "for Ascend NPUs; no effect here")
    dataloader_num_workers: CountOrZero = flag(0, "processes that read images not yet encoded")
    rank: Count = flag(4, "rank of every adapted layer")
    alpha: Positive | None = flag(None, "the adapter counts by alpha / rank; default: rank")
    target: Literal[tuple(TARGETS)] = flag("attention", "which UNet layers are adapted")
    target_blocks: list[str] | None = flag(None, "adapt only these blocks: down.2 mid up.1")
    use_dora: bool = flag(False, "train DoRA: a magnitude beside the low-rank direction")
    lora_dropout: Share = flag(0.0, "dropout on the adapter's input")
    train_text_encoder: bool = flag(False, "adapt the text encoders as well")
    output_dir: str = flag("sd-model-finetuned-lora", "folder for adapter, checkpoints and images")
    output_kohya_format: bool = flag(False, "write the adapter with Kohya's keys too")
    checkpointing_steps: Count = flag(500, "save a checkpoint every so many steps")
    checkpoints_total_limit: Count | None = flag(None, "keep only the newest so many checkpoints")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint's folder, or latest")
    report_to: TRACKERS = flag("tensorboard", "where numbers and images go (extra trackers)")
    logging_dir: str = flag("logs", "folder for these reports, inside output_dir")
    push_to_hub: bool = flag(False, "upload the adapter when it is done")
    hub_token: str | None = flag(None, "token for that; better: HF_TOKEN", secret=True)
    hub_model_id: str | None = flag(None, "repository for that; default: the name of output_dir")
    local_rank: int = flag(-1, "set by old launchers; no effect")

    # fields of one method, as the other has them
    instance_prompt = class_prompt = class_data_dir = tokenizer_name = tokenizer_max_length = None
    with_prior_preservation = pre_compute_text_embeddings = do_edm_style_training = False
    text_encoder_use_attention_mask = debug_loss = False

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, os.PathLike):  # so that it can stand in the adapter's metadata
                object.__setattr__(self, option.name, os.fspath(value))
            elif isinstance(value, tuple):
                object.__setattr__(self, option.name, list(value))
            elif option.name in SOURCES and not isinstance(value, str | None):
                raise ValueError(
                    f"{option.name} names a folder or data set, and {type(value).__name__} is "
                    "none; save such pictures, "
                    "lb.load_captioned_images(…).save_to_disk(folder), and give that folder"
                )
        check_fields(self)
        for name in TEXTS:
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"{name} is empty; give it some text or leave it out")
        self._check_combinations()
        _check_output(Path(self.output_dir))

    def _check_combinations(self) -> None:
        sources = [name for name in SOURCES if getattr(self, name, None)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both given; give one of them")
        for name, other, reason in CONFLICTS:
            if getattr(self, name) and getattr(self, other):
                raise ValueError(f"{name} cannot go with {other}, {reason}; give one of them")
        if (self.class_data_dir or self.with_prior_preservation) and not self.class_prompt:
            cause = "class_data_dir" if self.class_data_dir else "prior preservation"
            raise ValueError(
                f"class_prompt is missing: {cause} needs a prompt that names the class, as in "
                "«a photo of a dog»"
            )
        if self.with_prior_preservation and not self.class_data_dir:
            raise ValueError(
                "class_data_dir is missing: prior preservation needs a folder for the class images"
            )
        if self.hub_token and self.report_to in ("wandb", "all"):
            raise ValueError(
                "hub_token cannot go with report_to wandb, which uploads the command line; "
                "set HF_TOKEN instead"
            )

    @property
    def repository(self) -> str:
        """The repository that the adapter is pushed to, if it is."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    @property
    def without_effect(self) -> list[str]:
        """A sentence for each flag that was given and can do nothing here."""
        reasons = {name: why for name, why in WITHOUT_EFFECT.items() if getattr(self, name, None)}
        sentences = [f"{name} has no effect: {why}" for name, why in reasons.items()]
        if self.local_rank != -1:
            sentences.append(
                "local_rank has no effect: the launcher's environment tells each process its place"
            )
        if self.use_8bit_adam and self.optimizer == "prodigy":
            sentences.append("use_8bit_adam has no effect with optimizer prodigy")
        if self.class_prompt and not self.with_prior_preservation:
            sentences.append(
                "class_prompt and class_data_dir have no effect without with_prior_preservation"
            )
        return sentences


@dataclass(frozen=True)
class TextToImageConfig(TrainingConfig):
    """A text-to-image LoRA training run, with the flags of diffusers' train_text_to_image_lora.py.

    Every field is a flag, and `python -m lorabook.training.text_to_image --help` says what it does.

    Raises: ValueError, naming the field, if a value cannot be used.
    """

    train_data_dir: str | None = flag(None, "captioned images: a folder")
    max_train_samples: Count | None = flag(None, "use only the first so many images")
    allow_empty_captions: bool = flag(False, "train although no image has a caption")
    debug_loss: bool = flag(False, "report the loss of each image by its number")

    method = "text_to_image"


@dataclass(frozen=True)
class DreamBoothConfig(TrainingConfig):
    """A DreamBooth LoRA training run, with the flags of diffusers' train_dreambooth_lora(_sdxl).py.

    Every field is a flag, and `python -m lorabook.training.dreambooth --help` says what it does.

    Raises: ValueError, naming the field, if a value cannot be used.
    """

    instance_data_dir: str | None = flag(None, "images of the subject: a folder or bundled name")
    instance_prompt: str | None = flag(None, "the subject by a rare word: a photo of sks dog")
    class_data_dir: str | None = flag(None, "folder of class images; missing ones are generated")
    class_prompt: str | None = flag(None, "prompt of the class, as in: a photo of a dog")
    with_prior_preservation: bool = flag(False, "learn from images of the class too")
    prior_loss_weight: Amount = flag(1.0, "weight of the class images in the loss")
    num_class_images: Count = flag(100, "number of class images")
    sample_batch_size: Count = flag(4, "class images generated at once")
    prior_generation_precision: CLASS_PRECISIONS | None = flag(None, "and their precision")
    repeats: Count = flag(1, "times that each instance image counts in an epoch")
    train_batch_size: Count = flag(4, "instance images a step on each device, beside class images")
    num_train_epochs: Count = flag(1, "passes over the images, without max_train_steps")
    validation_epochs: Count = flag(50, "generate validation images every so many epochs")
    learning_rate: Positive | None = flag(None, "learning rate; default: 5e-4, for SDXL 1e-4")
    adam_weight_decay: Amount | None = flag(None, "weight decay; default: 1e-2, for SDXL 1e-4")
    output_dir: str = flag("lora-dreambooth-model", "folder for adapter, checkpoints and images")
    tokenizer_name: str | None = flag(None, "another tokenizer: folder or Hub id")
    tokenizer_max_length: Count | None = flag(None, "tokens that a prompt is filled up to")
    text_encoder_use_attention_mask: bool = flag(False, "encode prompts without their padding")
    pre_compute_text_embeddings: bool = flag(False, "encode prompts once; done anyway if frozen")
    validation_images: list[str] | None = flag(None, "for DeepFloyd IF's upscaler; no effect")
    class_labels_conditioning: str | None = flag(None, "for DeepFloyd IF's upscaler; no effect")
    do_edm_style_training: bool = flag(False, "measure the loss on denoised latents, as EDM does")

    method = "dreambooth"


def _check_output(folder: Path) -> None:
    """Fail now rather than after training where the output folder cannot be made."""
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "may not be written to" if parent.is_dir() else "is a file"
        raise ValueError(
            f"output_dir {str(folder)!r} cannot be made: {parent} {reason}; give a folder "
            "that can be"
        )
