"""What differs between model families in training, each in one small object."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import compute_snr, free_memory, offload_models
from torch import Tensor

from lorabook.training.config import TrainingConfig


@dataclass
class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder; predicts epsilon or v."""

    pipe: DiffusionPipeline
    noise: DDPMScheduler  # the schedule that training adds noise by

    pipeline_class: ClassVar[type] = StableDiffusionPipeline
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # by method, what its reference script does where a config says None
    defaults: ClassVar[dict[str, dict]] = {
        "text_to_image": {},
        "dreambooth": {"learning_rate": 5e-4, "adam_weight_decay": 1e-2},
    }

    @cached_property
    def device(self) -> torch.device:
        """Where the UNet is; asked once, since asking a model takes a share of a small step."""
        return self.pipe.unet.device

    @property
    def encoders(self) -> tuple[str, ...]:
        """The components that encode images and prompts."""
        return "vae", *self.text_encoders

    @property
    def resolution(self) -> int:
        """The side of the model's own images, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def resolve(self, config: TrainingConfig) -> TrainingConfig:
        """The config with this family's values where it says None."""
        defaults = self.defaults[config.method].items()
        return replace(config, **{k: v for k, v in defaults if getattr(config, k) is None})

    @contextmanager
    def on_device(self, components: Iterable[str], device: torch.device | str) -> Iterator[None]:
        """Have components of the pipeline on a device inside the block, and back after it.

        The memory that they leave is given back to the device, so that the next step finds it.
        """
        models = [getattr(self.pipe, component) for component in components]
        free = free_memory if self.device.type != "cpu" else lambda: None
        with offload_models(*models, device=device):
            free()
            yield
        free()

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Prompt embeddings: one tensor, (prompts, tokens, width)."""
        return self.pipe.encode_prompt(prompts, self.device, 1, False)[:1]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Mean and deviation of the latents, scaled, (images, 2, channels, height, width).

        The pixels are (images, 3, height, width), −1 to 1.
        """
        vae = self.pipe.vae
        with torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1) * vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what the UNet should predict from them."""
        noisy = self.noise.add_noise(latents, noise, timesteps)
        if self.noise.config.prediction_type == "v_prediction":
            return noisy, self.noise.get_velocity(latents, noise, timesteps)
        return noisy, noise

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: tuple[Tensor, ...], geometry: Tensor
    ) -> Tensor:
        """The UNet's prediction for noisy latents, (images, channels, height, width).

        The geometry is (images, 4): original height and width, top and left of the crop, in pixels.
        """
        return self.pipe.unet(noisy, timesteps, prompts[0], return_dict=False)[0]

    def losses(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        snr_gamma: float | None = None,
        denoised: bool = False,
    ) -> Tensor:
        """The squared error of each image, (images,).

        Args:
            snr_gamma: Weigh by min-SNR, clamped at this (Hang et al. 2023, arXiv:2303.09556).
            denoised: The error of the denoised latents over the noise's variance, as in EDM's loss
                (Karras et al. 2022, arXiv:2206.00364): for epsilon the plain error, for v the
                error times its share of signal.
        """
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
        velocity = self.noise.config.prediction_type == "v_prediction"
        if denoised and velocity:
            return errors * self.noise.alphas_cumprod.to(errors.device)[timesteps]
        if snr_gamma is None or denoised:
            return errors
        snr = compute_snr(self.noise, timesteps)
        weight = snr.clamp(max=snr_gamma) / (snr + velocity)
        return errors * weight.nan_to_num(1.0)  # epsilon at a signal of zero: 0 / 0


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, a pooled embedding, the image's size and crop."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    defaults = {
        "text_to_image": {},
        "dreambooth": {
            "learning_rate": 1e-4,
            "adam_weight_decay": 1e-4,
            "text_encoder_lr": 5e-6,
            "adam_weight_decay_text_encoder": 1e-3,
        },
    }

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As above; a VAE that overflows in half precision works in float32."""
        if self.pipe.vae.config.force_upcast and self.pipe.vae.dtype != torch.float32:
            self.pipe.vae.to(torch.float32)
        return super().encode_images(pixels)

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Embeddings, (prompts, tokens, width), and pooled ones, (prompts, width)."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: tuple[Tensor, ...], geometry: Tensor
    ) -> Tensor:
        """The UNet's prediction; arguments as above."""
        sides = [side * self.pipe.vae_scale_factor for side in noisy.shape[-2:]]
        size = [noisy.new_full((len(noisy), 1), side) for side in sides]
        added = {"text_embeds": prompts[1], "time_ids": torch.cat([geometry.to(noisy), *size], 1)}
        unet = self.pipe.unet
        return unet(noisy, timesteps, prompts[0], added_cond_kwargs=added, return_dict=False)[0]


FAMILIES = (StableDiffusion, StableDiffusionXL)
OTHER_MODELS = {  # by the channels that a UNet takes
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model",
    9: "an inpainting model",
}


def family_of(pipe: DiffusionPipeline, prediction_type: str | None = None) -> StableDiffusion:
    """The family object for a pipeline; ValueError if its kind of model cannot be trained.

    Args:
        prediction_type: What the UNet predicts, where that is not the model's own; the pipeline's
            scheduler, which generates the validation images, learns of it too.
    """
    for family in FAMILIES:
        if isinstance(pipe, family.pipeline_class):
            check_trainable(pipe.config, pipe.unet.config)
            changes = {"prediction_type": prediction_type} if prediction_type else {}
            schedule = pipe.scheduler.config
            if changes:
                pipe.scheduler = type(pipe.scheduler).from_config(schedule, **changes)
            return family(pipe, DDPMScheduler.from_config(schedule, **changes))
    raise _untrainable(type(pipe).__name__)


def check_trainable(index: Mapping, unet: Mapping) -> None:
    """Raise ValueError if a model has no UNet, or one that sees more than latents and a prompt.

    Asked are its model_index.json and its UNet's config.json.
    """
    if "unet" not in index:
        raise _untrainable(str(index.get("_class_name")))
    taken, predicted = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if taken != predicted:
        raise ValueError(
            f"the base model is {OTHER_MODELS.get(taken, 'made for another task')}: its UNet takes "
            f"{taken} channels, and training gives it the {predicted} of noisy latents; train on "
            "the plain text-to-image model that it comes from, whose adapter loads on both unless "
            "it holds conv_in"
        )
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise ValueError(
            "the base model's UNet takes class labels beside the prompt, and training has none; "
            "train on a plain text-to-image model"
        )


def _untrainable(kind: str) -> ValueError:
    names = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    return ValueError(f"{kind} cannot be trained; the families are: {names}")
