import pytest
import torch
from diffusers import DDPMScheduler

from lorabook.training.families import StableDiffusion, family_of


def test_the_target_is_what_the_model_predicts(pipe):
    latents, noise = torch.randn(2, 2, 4, 16, 16).unbind()
    steps = torch.tensor([10, 900])
    velocity = family_of(pipe).add_noise(latents, noise, steps)[1]
    epsilon = family_of(pipe, "epsilon").add_noise(latents, noise, steps)[1]
    assert torch.equal(epsilon, noise) and not torch.allclose(velocity, noise)


def test_the_last_step_is_noise_alone(pipe):
    latents, noise = torch.randn(2, 1, 4, 16, 16).unbind()
    noisy, velocity = family_of(pipe).add_noise(latents, noise, torch.tensor([999]))
    assert torch.allclose(noisy, noise, atol=1e-5) and torch.allclose(velocity, -latents, atol=1e-5)


def test_the_resolution_is_the_models_own(pipe):
    assert family_of(pipe).resolution == 64


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_by_the_clamped_signal_to_noise_ratio(pipe, prediction_type):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    family, step = StableDiffusion(pipe, schedule), torch.tensor([50])
    ratio = (schedule.alphas_cumprod[50] / (1 - schedule.alphas_cumprod[50])).item()
    prediction, target = torch.randn(2, 1, 4, 8, 8).unbind()
    weight = min(ratio, 5) / (ratio + (prediction_type == "v_prediction"))
    plain = family.loss(prediction, target, step)
    assert family.loss(prediction, target, step, 5.0).item() == pytest.approx(weight * plain.item(), rel=1e-4)


def test_min_snr_is_finite_where_there_is_no_signal(pipe):
    prediction, target = torch.randn(2, 1, 4, 16, 16).unbind()
    for kind in ("epsilon", "v_prediction"):
        assert family_of(pipe, kind).loss(prediction, target, torch.tensor([999]), 5.0).isfinite()


def test_a_pipeline_of_another_family_is_named():
    class OtherPipeline:
        pass
    with pytest.raises(ValueError, match="OtherPipeline cannot be trained"):
        family_of(OtherPipeline())
