import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler

import lorabook as lb
from conftest import quick_config, quick_dreambooth, tiny_sdxl
from lorabook.training.families import StableDiffusion, family_of
from lorabook.worlds import DATA


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
    plain = family.losses(prediction, target, step)
    assert family.losses(prediction, target, step, 5.0).item() == pytest.approx(
        weight * plain.item(), rel=1e-4
    )


def test_min_snr_is_finite_where_there_is_no_signal(pipe):
    prediction, target = torch.randn(2, 1, 4, 16, 16).unbind()
    for kind in ("epsilon", "v_prediction"):
        assert family_of(pipe, kind).losses(prediction, target, torch.tensor([999]), 5.0).isfinite()


def test_a_pipeline_of_another_family_is_named():
    class OtherPipeline:
        pass

    with pytest.raises(ValueError, match="OtherPipeline cannot be trained"):
        family_of(OtherPipeline())


def test_sdxl_gives_embeddings_a_pooled_one_and_takes_size_and_crop(tmp_path):
    family = family_of(lb.load_pipeline(tiny_sdxl(tmp_path), device="cpu"))
    embeddings, pooled = family.encode_prompts(["a red cat", "a boat"])
    assert embeddings.shape == (2, 77, 64) and pooled.shape == (2, 32)
    noisy, steps = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    here, there = (
        family.predict(noisy, steps, (embeddings, pooled), torch.tensor([[64, 64, top, 0]] * 2))
        for top in (0, 500)
    )
    assert here.shape == noisy.shape and not torch.allclose(here, there)


def test_edm_weighs_v_by_its_signal_and_leaves_epsilon_as_it_is(pipe):
    prediction, target = torch.randn(2, 1, 4, 16, 16).unbind()
    step = torch.tensor([300])
    for kind, weight in (("epsilon", 1.0), ("v_prediction", None)):
        family = family_of(pipe, kind)
        weight = weight or family.noise.alphas_cumprod[300].item()
        plain, ours = (
            family.losses(prediction, target, step, denoised=flag).item() for flag in (False, True)
        )
        assert ours == pytest.approx(weight * plain, rel=1e-5)


def test_edm_is_the_error_of_the_denoised_latents_over_the_variance_of_their_noise(pipe):
    family, step = family_of(pipe), torch.tensor([300])
    latents, noise, prediction = torch.randn(3, 1, 4, 16, 16).unbind()
    noisy, target = family.add_noise(latents, noise, step)
    signal = family.noise.alphas_cumprod[300]
    denoised = signal.sqrt() * noisy - (1 - signal).sqrt() * prediction
    expected = (denoised - latents).square().mean() * signal / (1 - signal)
    assert family.losses(prediction, target, step, denoised=True).item() == pytest.approx(
        expected.item(), rel=1e-3
    )


@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (5, "a depth-to-image model"),
        (7, "an upscaler"),
        (8, "an instruct-pix2pix model"),
        (9, "an inpainting model"),
        (6, "made for another task"),
    ],
)
@pytest.mark.parametrize(
    "train", [lb.train_text_to_image, lb.train_dreambooth], ids=["text_to_image", "dreambooth"]
)
def test_a_base_whose_unet_takes_more_than_latents_is_named_before_images_are_read(
    tmp_path, train, channels, kind
):
    base = tmp_path / "base"
    shutil.copytree(DATA / "tiny-sd", base)
    unet = json.loads((base / "unet/config.json").read_text())
    (base / "unet/config.json").write_text(json.dumps(unet | {"in_channels": channels}))
    told = {"pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / "out")}
    config = (
        quick_config(**told, dataset_name="nowhere")
        if train is lb.train_text_to_image
        else quick_dreambooth(**told, instance_data_dir="nowhere")
    )
    with pytest.raises(
        ValueError, match=f"base model is .*{kind}: its UNet takes {channels} channels.*conv_in"
    ) as raised:
        train(config)
    assert len(str(raised.value)) <= 400 and not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_named_by_its_folder_alone(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}'
    )
    with pytest.raises(ValueError, match="FluxPipeline cannot be trained; the families are"):
        lb.train_text_to_image(
            quick_config(pretrained_model_name_or_path=str(tmp_path), dataset_name="nowhere")
        )
