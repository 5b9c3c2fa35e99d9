import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
)

import lorabook as lb
from lorabook import schedulers
from lorabook.pipelines import find_model
from lorabook.schedulers import scheduler_like, scheduler_name, scheduler_named, usual_name


def test_without_a_gpu_the_bundled_model_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_model(None).endswith("tiny-sd")


def test_with_a_gpu_stable_diffusion_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_model(None) == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_bundled_model_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert isinstance(lb.load_pipeline("tiny-sd", device="cpu"), StableDiffusionPipeline)


def test_loading_is_silent(silent, capfd):
    lb.load_pipeline("tiny-sd", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_plain_diffusers_loads_the_bundled_model_in_float32():
    pipe = AutoPipelineForText2Image.from_pretrained(lb.bundled("tiny-sd"))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("name", ["euler", "EulerDiscreteScheduler"])
def test_a_scheduler_by_its_name(name):
    pipe = lb.load_pipeline("tiny-sd", device="cpu", scheduler=name)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "name, kind, options",
    [  # diffusers' table of A1111's names
        (
            "dpm++ 2m karras",
            "DPMSolverMultistep",
            {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"},
        ),
        ("DPM++ 2M Karras", "DPMSolverMultistep", {"use_karras_sigmas": True}),
        ("DPM++ 2M", "DPMSolverMultistep", {"use_karras_sigmas": False}),
        (
            "DPM++ 2M SDE",
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False},
        ),
        (
            "DPM++ 2M SDE Karras",
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        ("DPM++ SDE Karras", "DPMSolverSinglestep", {"use_karras_sigmas": True}),
        ("DPM2", "KDPM2Discrete", {}),
        ("DPM2 a Karras", "KDPM2AncestralDiscrete", {"use_karras_sigmas": True}),
        ("Euler a", "EulerAncestralDiscrete", {}),
        ("euler_karras", "EulerDiscrete", {"use_karras_sigmas": True}),
        ("Heun", "HeunDiscrete", {}),
        ("DDIM", "DDIM", {}),
        ("UniPC", "UniPCMultistep", {}),
        ("PLMS", "PNDM", {"skip_prk_steps": True}),
        ("DEIS", "DEISMultistep", {}),
        ("LCM", "LCM", {}),
        ("Euler SGM Uniform", "EulerDiscrete", {"timestep_spacing": "trailing"}),
        (
            "DPM++ 2M Exponential",
            "DPMSolverMultistep",
            {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
        ),
    ],
)
def test_a_scheduler_by_a1111s_name(name, kind, options):
    made = scheduler_like(
        DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True).config,
        name,
    )
    assert (
        type(made).__name__ == f"{kind}Scheduler" and made.config.prediction_type == "v_prediction"
    )
    assert {option: made.config[option] for option in options} == options
    assert usual_name(scheduler_name(made)) == scheduler_name(made)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "LCM"])
def test_a_scheduler_clips_no_latents_unless_the_model_says_so(name):
    config = dict(DPMSolverMultistepScheduler().config)
    assert not scheduler_like(config, name).config.clip_sample
    assert scheduler_like(config | {"clip_sample": True}, name).config.clip_sample
    assert not scheduler_like(config | {"clip_sample": False}, name).config.clip_sample


def test_upstream_still_clips_where_a_config_does_not_say():
    """Else `scheduler_like` needs no default of its own."""
    assert DDIMScheduler.from_config(DPMSolverMultistepScheduler().config).config.clip_sample


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "Euler a Karras",
            "'euler a' is not drawn with karras levels.*EulerAncestralDiscreteScheduler has no use_karras",
        ),
        ("DDIM Exponential", "has no use_exponential_sigmas"),
        ("DPM++ 2S a Karras", "unknown scheduler.*dpm\\+\\+ 2s"),
        ("karras", "unknown scheduler"),
        (3, "unknown scheduler 3"),
    ],
)
def test_levels_that_a_scheduler_does_not_have_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        lb.load_pipeline("tiny-sd", scheduler=name)


def test_a_scheduler_that_needs_a_package_says_which(monkeypatch):
    monkeypatch.setattr(schedulers, "find_spec", lambda package: None)
    monkeypatch.setattr(LMSDiscreteScheduler, "_backends", ["torch", "scipy"], raising=False)
    with pytest.raises(ValueError, match="'LMS Karras' needs .*scipy: pip install"):
        scheduler_named("LMS Karras")
    with pytest.raises(ValueError, match="'DPM\\+\\+ 2M Beta' needs scipy"):
        scheduler_named("DPM++ 2M Beta")


def test_an_unknown_scheduler_lists_the_names():
    with pytest.raises(ValueError, match="'oiler'.*ddim.*euler"):
        lb.load_pipeline("tiny-sd", scheduler="oiler")


def test_a_retired_id_is_replaced_with_a_warning():
    with pytest.warns(UserWarning, match="gone from the Hub"):
        assert (
            find_model("runwayml/stable-diffusion-v1-5")
            == "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )


def test_an_unknown_model_says_what_was_looked_for_and_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"'nothing' not found: no folder {tmp_path}/nothing"
    ):
        lb.load_pipeline("nothing")


def test_a_model_the_hub_does_not_give_says_so(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="owner/nothing.*the Hub"):
        lb.load_pipeline("owner/nothing", device="cpu")


def test_a_folder_that_is_no_pipeline_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        lb.load_pipeline(tmp_path)


def test_low_memory_draws_the_same_picture(pipe):
    call = dict(prompt="a red cat", num_inference_steps=2, output_type="pt")
    usual = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    sparing = lb.load_pipeline("tiny-sd", device="cpu", low_memory=True)
    sparing.set_progress_bar_config(disable=True)
    assert torch.equal(usual, sparing(**call, generator=torch.Generator().manual_seed(0)).images)
