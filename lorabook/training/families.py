"""What differs between model families in training, each in one small object."""

from collections.abc import Mapping
from dataclasses import dataclass
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
from diffusers.training_utils import compute_snr
from torch import Tensor


@dataclass
class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder; predicts epsilon or v.

    Attributes:
        pipe: the pipeline whose parts are trained.
        noise: the schedule that training adds noise by.
        defaults: by training method, what its reference script does where a config leaves it open.
    """

    pipe: DiffusionPipeline
    noise: DDPMScheduler

    pipeline_class: ClassVar[type] = StableDiffusionPipeline
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    defaults: ClassVar[dict[str, dict]] = {
        "text_to_image": {},
        "dreambooth": {"learning_rate": 5e-4, "adam_weight_decay": 1e-2},
    }

    @classmethod
    def of(cls, pipe: DiffusionPipeline, prediction_type: str | None = None) -> "StableDiffusion":
        """The family object of a pipeline; `prediction_type` overrides the model's own."""
        noise = DDPMScheduler.from_config(pipe.scheduler.config)
        if prediction_type:  # of the pipeline's own too, which draws the validation pictures
            noise.register_to_config(prediction_type=prediction_type)
            pipe.scheduler = type(pipe.scheduler).from_config(
                pipe.scheduler.config, prediction_type=prediction_type
            )
        return cls(pipe, noise)

    @cached_property
    def device(self) -> torch.device:
        """Where the UNet is; asked once, since asking a model takes a share of a small step."""
        return self.pipe.unet.device

    @property
    def encoders(self) -> tuple[str, ...]:
        """The parts that encode images and prompts."""
        return "vae", *self.text_encoders

    @property
    def resolution(self) -> int:
        """The side of the images that the model was made for, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Prompt embeddings: one tensor, (prompts, tokens, width)."""
        return self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[
            :1
        ]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Mean and deviation of the images' latents, scaled; pixels: (batch, 3, height, width), −1 to 1.

        Returns: (batch, 2, channels, latent height, latent width).
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
        """The UNet's prediction.

        Args:
            noisy: (batch, channels, height, width).
            timesteps: (batch,).
            prompts: what `encode_prompts` returned, a row an image.
            geometry: (batch, 4): original height and width, top and left of the crop, in pixels.
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
        """The squared error of each image, (batch,).

        Args:
            snr_gamma: weigh by min-SNR, clamped at this (Hang et al. 2023, arXiv:2303.09556).
            denoised: the error of the denoised latents over the noise's variance, as in EDM's loss (Karras et al.
                2022, arXiv:2206.00364); for epsilon that is the plain error, for v its share of signal.
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
    """Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size and crop as numbers."""

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
        """Prompt embeddings, (prompts, tokens, width), and the second encoder's pooled ones, (prompts, width)."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: tuple[Tensor, ...], geometry: Tensor
    ) -> Tensor:
        """The UNet's prediction; arguments as above."""
        size = [
            noisy.new_full((len(noisy), 1), side * self.pipe.vae_scale_factor)
            for side in noisy.shape[-2:]
        ]
        time_ids = torch.cat([geometry.to(noisy), *size], 1)
        added = {"text_embeds": prompts[1], "time_ids": time_ids}
        return self.pipe.unet(
            noisy, timesteps, prompts[0], added_cond_kwargs=added, return_dict=False
        )[0]


FAMILIES = (StableDiffusion, StableDiffusionXL)
MORE_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model",
    9: "an inpainting model",
}


def family_of(pipe: DiffusionPipeline, prediction_type: str | None = None) -> StableDiffusion:
    """The family object for a pipeline.

    Raises: ValueError if its kind of model cannot be trained.
    """
    for family in FAMILIES:
        if isinstance(pipe, family.pipeline_class):
            check_trainable(pipe.config, pipe.unet.config)
            return family.of(pipe, prediction_type)
    raise _untrainable(type(pipe).__name__)


def check_trainable(index: Mapping, unet: Mapping) -> None:
    """Check a model by its configs alone.

    Args:
        index, unet: what its model_index.json and its UNet's config.json hold.
    Raises: ValueError if its UNet sees more than noisy latents and a prompt, or if it has none.
    """
    kind = str(index.get("_class_name"))
    if "unet" not in index:
        raise _untrainable(kind)
    seen, predicted = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if seen != predicted:
        kind = MORE_CHANNELS.get(seen, "made for another task")
        raise ValueError(
            f"the base model is {kind}: its UNet takes {seen} channels, and training gives it the "
            f"{predicted} of noisy latents; train on the plain text-to-image model that it comes from, whose "
            "adapter loads on both unless it holds conv_in"
        )
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise ValueError(
            "the base model's UNet takes class labels beside the prompt, and training has none; train on a "
            "plain text-to-image model"
        )


def _untrainable(kind: str) -> ValueError:
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    return ValueError(f"{kind} cannot be trained; the families are: {known}")
