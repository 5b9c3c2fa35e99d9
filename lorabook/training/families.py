"""What differs between model families in training, each in one small object."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor


@dataclass
class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder; predicts epsilon or v.

    Attributes:
        pipe: the pipeline whose UNet is trained.
        noise: the schedule that training adds noise by.
    """

    pipe: StableDiffusionPipeline
    noise: DDPMScheduler

    @classmethod
    def of(cls, pipe: StableDiffusionPipeline, prediction_type: str | None = None) -> "StableDiffusion":
        """The family object of a pipeline; `prediction_type` overrides the model's own."""
        noise = DDPMScheduler.from_config(pipe.scheduler.config)
        if prediction_type:
            noise.register_to_config(prediction_type=prediction_type)
        return cls(pipe, noise)

    @property
    def resolution(self) -> int:
        """The side of the images that the model was made for, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings, (prompts, tokens, width)."""
        return self.pipe.encode_prompt(prompts, self.pipe.device, 1, do_classifier_free_guidance=False)[0]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the images' latents, scaled; pixels: (batch, 3, height, width), −1 to 1."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what the UNet should predict from them."""
        noisy = self.noise.add_noise(latents, noise, timesteps)
        if self.noise.config.prediction_type == "v_prediction":
            return noisy, self.noise.get_velocity(latents, noise, timesteps)
        return noisy, noise

    def predict(self, unet, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's prediction."""
        return unet(noisy, timesteps, embeddings, return_dict=False)[0]

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """Mean squared error, weighed by min-SNR where `snr_gamma` is given (Hang et al. 2023, arXiv:2303.09556)."""
        if snr_gamma is None:
            return F.mse_loss(prediction.float(), target.float())
        snr = compute_snr(self.noise, timesteps)
        weight = snr.clamp(max=snr_gamma) / (snr + (self.noise.config.prediction_type == "v_prediction"))
        weight = weight.nan_to_num(1.0)  # epsilon at a signal of zero: 0 / 0
        return (weight * F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))).mean()


def family_of(pipe: DiffusionPipeline, prediction_type: str | None = None) -> StableDiffusion:
    """The family object for a pipeline.

    Raises: ValueError if its kind of model cannot be trained.
    """
    if isinstance(pipe, StableDiffusionPipeline):
        return StableDiffusion.of(pipe, prediction_type)
    raise ValueError(f"{type(pipe).__name__} cannot be trained; the families are: StableDiffusionPipeline")
