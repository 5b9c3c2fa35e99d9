import shutil
import warnings

import pytest
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import lorabook as lb
from lorabook import pipelines, worlds
from lorabook.metrics import text_features
from lorabook.pipelines import whole_weights

FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
MODELS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@pytest.fixture
def copy(tmp_path):
    """A copy of tiny-sd, and a function that changes the weights of one of its models."""
    folder = shutil.copytree(lb.bundled("tiny-sd"), tmp_path / "tiny-sd")

    def change(part, how):
        weights = load_file(folder / part / FILES[part])
        how(weights)
        save_file(weights, folder / part / FILES[part], metadata={"format": "pt"})

    return folder, change


def lose(weights):
    del weights[min(weights)]


def rename(weights):
    for key in list(weights):
        weights[f"somewhere.{key}"] = weights.pop(key)


def add(weights):
    weights["somewhere.else"] = weights[min(weights)].clone()


@pytest.mark.parametrize(
    "how, said", [(lose, "lacks 1 of its weights"), (rename, "and holds [0-9]+ without a place")]
)
@pytest.mark.parametrize("part", MODELS)
def test_a_folder_that_lacks_weights_is_refused(copy, part, how, said):
    folder, change = copy
    change(part, how)
    with pytest.raises(
        FileNotFoundError, match=f"not read whole: the file of {MODELS[part]} .*{said}"
    ) as caught:
        lb.load_pipeline(folder, device="cpu")
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


def test_a_folder_with_weights_too_many_is_loaded_with_a_warning(copy):
    folder, change = copy
    change("unet", add)
    with pytest.warns(
        UserWarning,
        match="the file of UNet2DConditionModel holds 1 without a place .somewhere.else",
    ):
        lb.load_pipeline(folder, device="cpu")


@pytest.mark.parametrize("how", [lose, add])
def test_a_bundled_model_holds_exactly_its_weights(copy, how, monkeypatch):
    folder, change = copy
    change("vae", how)
    for module in (pipelines, worlds):
        monkeypatch.setattr(module, "DATA", folder.parent)
    with pytest.raises(
        FileNotFoundError, match="bundled model .*AutoencoderKL.*fetch the repository's data/ anew"
    ):
        lb.load_pipeline("tiny-sd", device="cpu")


def test_what_lacks_on_the_hub_is_a_warning(copy):
    folder, change = copy
    change("unet", lose)
    with (
        pytest.warns(
            UserWarning, match="model owner/name is not read whole: .* which would be random"
        ),
        whole_weights("owner/name"),
    ):
        pipelines._from_pretrained(str(folder), None)


def test_a_clip_model_that_lacks_weights_is_refused(tmp_path):
    folder = shutil.copytree(lb.bundled("tiny-clip"), tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    lose(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileNotFoundError, match="the file of CLIPModel lacks 1 of its weights"):
        text_features(["a cat"], model=folder)


def test_a_vae_that_lacks_weights_is_refused_before_training(copy):
    from conftest import quick_config

    folder, change = copy
    change("vae", lose)
    with pytest.raises(FileNotFoundError, match="the file of AutoencoderKL lacks 1 of its weights"):
        lb.train_text_to_image(quick_config(pretrained_vae_model_name_or_path=str(folder / "vae")))


def test_the_libraries_own_calls_are_as_they_were():
    before = [vars(library)["from_pretrained"] for library in (ModelMixin, PreTrainedModel)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lb.load_pipeline("tiny-sd", device="cpu")
    with pytest.raises(FileNotFoundError):
        lb.load_pipeline("nothing")
    assert before == [vars(library)["from_pretrained"] for library in (ModelMixin, PreTrainedModel)]
