import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import lorabook as lb
from adapter_files import WRITERS, plain
from loopback_hub import TOKEN
from loopback_site import Site
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.lora.source import read_source


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """PEFT's own folder for a UNet and a text encoder."""
    return WRITERS["PEFT folder, rsLoRA"](
        plain(str(lb.bundled("tiny-sd"))), tmp_path_factory.mktemp("peft")
    )


def test_an_adapter_comes_from_an_address_with_its_hash_and_a_name(pipe):
    with Site() as site:
        body = read_source("ink").path.read_bytes()
        site.give("/api/download/models/15603", body, name="ink_v1.0.safetensors")
        report = lb.load_adapter(pipe, f"{site.url}/api/download/models/15603")
        assert report.name == "ink_v1_0" and report.matched == 558 and len(report.sha256) == 64
        lb.remove_adapter(pipe, report.name)
        site.files.clear()  # the second time it comes from the cache
        assert (
            lb.load_adapter(pipe, f"{site.url}/api/download/models/15603").sha256 == report.sha256
        )


def test_the_hubs_repository_tells_name_base_model_and_trigger_words_by_its_card(
    hub, pipe, tmp_path
):
    weights = {key: value.contiguous() for key, value in load_file(read_source("ink").path).items()}
    from safetensors.torch import save

    hub.repos["someone/old"] = {
        WEIGHT_NAME: save(weights),
        "README.md": b"---\nbase_model: runwayml/stable-diffusion-v1-5\n"
        b"instance_prompt: a photo of sks dog\n---\nhello",
    }
    report = lb.load_adapter(pipe, "someone/old", cache_dir=str(tmp_path))
    assert (
        report.name == "old" and report.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert report.trigger_words == ("a photo of sks dog",)


def test_pefts_folder_by_component_loads_whole_from_a_folder_and_from_the_hub(
    hub, pipe, peft, tmp_path
):
    report = lb.load_adapter(pipe, peft, "here")
    assert report.layers.keys() == {"unet", "text_encoder"} and report.format == "PEFT"
    files = [path for path in peft.rglob("*") if path.is_file()]
    hub.repos["someone/peft"] = {str(path.relative_to(peft)): path.read_bytes() for path in files}
    found = lb.load_adapter(pipe, "someone/peft", cache_dir=str(tmp_path))
    assert found.name == "peft" and found.layers == report.layers
    assert lb.load_adapter(pipe, peft / "unet", "half").layers.keys() == {"unet"}


def test_a_peft_config_that_is_no_json_is_named(peft, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (peft / "unet/adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="adapter_config.json is no JSON"):
        read_source(tmp_path)


@pytest.mark.parametrize("sort", ["LoHa", "LoKr"])
@pytest.mark.parametrize("effective", [False, True])
def test_pefts_own_loha_and_lokr_have_pefts_delta(sort, effective, tmp_path):
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    torch.manual_seed(0)
    unet = plain(str(lb.bundled("tiny-sd"))).unet
    config = {"LoHa": LoHaConfig, "LoKr": LoKrConfig}[sort]
    told = dict(
        r=2,
        alpha=3,
        target_modules=["to_q", "conv1"],
        use_effective_conv2d=effective,
        init_weights=False,
        rank_pattern={"mid_block.resnets.0.conv1": 3},
    )
    model = get_peft_model(
        unet, config(**told | ({"decompose_both": True} if sort == "LoKr" else {}))
    )
    model.save_pretrained(tmp_path)
    layers = read_source(tmp_path).adapter.layers["unet"]
    for name, layer in layers.items():
        own = unet.get_submodule(name)
        expected = own.get_delta_weight("default").detach().flatten(1)
        assert (layer.delta() - expected).norm() <= 1e-5 * expected.norm(), name
    assert len(layers) > 40


def test_a_state_dict_loads_and_says_what_was_assumed(pipe):
    weights = {
        key: value
        for key, value in load_file(read_source("ink").path).items()
        if "mid_block" in key
    }
    report = lb.load_adapter(pipe, weights, "part")
    assert report.path is None and report.sha256 is None and report.layers == {"unet": 18}
    assert report.missing == ("alpha of 18 layers, taken as their rank",)
    assert "assumed" in report._repr_html_()


def test_components_that_are_not_asked_for_are_told_as_ignored(pipe):
    report = lb.load_adapter(pipe, "patch_cat", components=["unet"])
    assert report.layers.keys() == {"unet"} and len(report.ignored) == 16 and report.matched == 558


def test_a_text_encoder_adapter_without_out_proj_loads(pipe):
    weights = load_file(read_source("patch_cat").path)
    kept = {
        key: value
        for key, value in weights.items()
        if key.startswith("text_encoder") and "out_proj" not in key
    }
    assert lb.load_adapter(pipe, kept, "words").layers == {"text_encoder": 12}


def test_a_bundled_file_knows_its_base_model():
    assert (
        lb.base_model_of("creatures") == "tiny-sd"
        and lb.load_pipeline(lb.base_model_of("creatures")).unet
    )
    assert json.loads(read_source("creatures").adapter.metadata["training"])["rank"] == 16
    assert Path(read_source("creatures").path).name == WEIGHT_NAME


def test_a_fused_pipeline_is_pushed_whole(hub, pipe, monkeypatch):
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    lb.load_adapter(pipe, "ink")
    lb.fuse(pipe)
    pipe.push_to_hub("someone/inked", token=TOKEN)
    weights = load(hub.repos["someone/inked"]["unet/diffusion_pytorch_model.safetensors"])
    fused = pipe.unet.state_dict()
    assert weights.keys() == fused.keys() and all(
        torch.equal(weights[key], fused[key]) for key in fused
    )


def test_eight_bit_weights_load(pipe, tmp_path):
    save_file(
        {
            key: value.to(torch.float8_e4m3fn)
            for key, value in load_file(read_source("ink").path).items()
        },
        tmp_path / "small.safetensors",
    )
    assert lb.load_adapter(pipe, tmp_path / "small.safetensors").matched == 558


def test_flattened_pointwise_convolutions_are_written_as_diffusers_reads_them(pipe, tmp_path):
    lb.save_adapter("creatures", tmp_path / "k.safetensors", "kohya")
    save_file(
        {
            key: value.flatten(1) if value.dim() == 4 and value.shape[2:].numel() == 1 else value
            for key, value in load_file(tmp_path / "k.safetensors").items()
            if "conv1" not in key
            and "conv2" not in key
            and "conv_" not in key
            and "sampler" not in key
        },
        tmp_path / "flat.safetensors",
    )
    lb.save_adapter(tmp_path / "flat.safetensors", tmp_path / "again")
    pipe.load_lora_weights(tmp_path / "again", adapter_name="it")
    assert lb.list_adapters(pipe)["it"].ranks == (16,)


@pytest.mark.parametrize("source", [None, 3, [], {"a": 1.0}])
def test_what_is_no_source_is_one_sentence(pipe, source):
    with pytest.raises(ValueError, match="an adapter comes from|holds something that is no tensor"):
        lb.load_adapter(pipe, source)


def test_components_a_pipeline_lacks_are_named_with_the_remedy(pipe):
    pipe.text_encoder = None
    with pytest.raises(
        ValueError,
        match=r"has layers for text_encoder, which this pipeline lacks.*components=\['unet'\]",
    ):
        lb.load_adapter(pipe, "patch_cat")
    lb.load_adapter(pipe, "patch_cat", components="unet")
    assert lb.set_scales(pipe, {"patch_cat": "INS"})["patch_cat"].keys() == {"unet"}
