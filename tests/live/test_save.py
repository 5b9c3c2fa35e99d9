import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorabook as lb
from adapter_files import ATTENTION, add_random, lycoris, plain
from lorabook.live.inject import adapter_of
from lorabook.live.match import base_weights
from lorabook.lora.source import read_source


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=3,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_alpha_and_metadata_come_along(tmp_path):
    weights = load_file(read_source("patch_cat").path)
    own = {
        "lora_adapter_metadata": json.dumps(
            {"unet.r": 8, "unet.lora_alpha": 2, "text_encoder.r": 8, "text_encoder.lora_alpha": 4}
        ),
        "trigger_words": '["sks"]',
        "base_model": "tiny-sd",
        "note": "kept",
    }
    save_file(weights, tmp_path / "a.safetensors", own)
    lb.save_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    lb.save_adapter(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    adapter = read_source(tmp_path / "c.safetensors").adapter
    assert {
        part: {layer.alpha for layer in layers.values()} for part, layers in adapter.layers.items()
    } == {"unet": {2.0}, "text_encoder": {4.0}}
    assert adapter.base_model == "tiny-sd" and adapter.trigger_words == ("sks",)
    assert metadata(tmp_path / "c.safetensors")["note"] == "kept"


def test_a_folder_or_a_file_is_written_and_loads(pipe, tmp_path):
    lb.load_adapter(pipe, "patch_cat", "it")
    expected = draw(pipe)
    lb.remove_adapter(pipe, "it")
    for number, (form, name) in enumerate(
        [
            ("diffusers", "folder"),
            ("diffusers", "one.safetensors"),
            ("kohya", "styles"),
            ("kohya", "two.safetensors"),
            ("peft", "parts"),
        ]
    ):
        report = lb.save_adapter("patch_cat", tmp_path / name, form)
        assert report.format == form and report.error == 0
        lb.load_adapter(pipe, report, f"it{number}")
        assert (draw(pipe) - expected).abs().max().item() < 1e-5
        lb.remove_adapter(pipe, f"it{number}")


def test_one_component_is_one_peft_folder_that_peft_itself_loads(pipe, tmp_path):
    from peft import PeftModel

    lb.save_adapter("ink", tmp_path / "ink", "peft")
    lb.load_adapter(pipe, "ink")
    expected, other = draw(pipe), plain(str(lb.bundled("tiny-sd")))
    PeftModel.from_pretrained(other.unet, tmp_path / "ink")
    assert (draw(other) - expected).abs().max().item() < 1e-4


def test_several_components_do_not_fit_into_one_peft_file(tmp_path):
    with pytest.raises(ValueError, match="PEFT keeps .* in a folder each; give a folder"):
        lb.save_adapter("patch_cat", tmp_path / "x.safetensors", "peft")
    assert not list(tmp_path.iterdir())


def test_kohyas_form_keeps_a_loha_as_it_is(pipe, tmp_path):
    path = lycoris("loha")(plain(str(lb.bundled("tiny-sd"))), tmp_path)
    lb.load_adapter(pipe, path, "it")
    lb.save_adapter(pipe, tmp_path / "again.safetensors", "kohya")
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    assert all(
        torch.equal(value, after[key.replace("lora_te_encoder", "lora_te_text_model_encoder")])
        for key, value in before.items()
        if "hada" in key
    )
    lb.save_adapter(pipe, tmp_path / "plain")
    assert (
        max(layer.rank for layer in read_source(tmp_path / "plain").adapter.layers["unet"].values())
        == 16
    )


def test_baked_scales_are_what_the_sliders_show(pipe, tmp_path):
    lb.load_adapter(pipe, "patch_cat", "it")
    lb.set_scales(
        pipe, {"it": {"text_encoder": 0.5, "unet": {"down": -0.5, "up": {"block_1": [0, 0.5, 1]}}}}
    )
    expected = draw(pipe)
    lb.save_adapter(pipe, tmp_path / "baked", bake_scales=True)
    lb.save_adapter(pipe, tmp_path / "trained")
    lb.unload_adapters(pipe)
    lb.load_adapter(pipe, tmp_path / "baked")
    assert (draw(pipe) - expected).abs().max().item() < 1e-5
    lb.unload_adapters(pipe)
    lb.load_adapter(pipe, tmp_path / "trained")
    assert (draw(pipe) - expected).abs().max().item() > 0.05


def test_scales_over_the_denoising_are_not_baked(pipe, tmp_path):
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"ink": {"steps": [[0, 0.5, 0]]}})
    with pytest.raises(ValueError, match="'ink' change over the denoising"):
        lb.save_adapter(pipe, tmp_path / "x", bake_scales=True)


def test_a_dora_is_written_exactly_even_where_it_must_become_a_lora(pipe, tmp_path):
    add_random(pipe, ATTENTION, use_dora=True)
    expected = draw(pipe)
    lb.set_scales(pipe, {"random": {"unet": {"mid": 1}}})
    lb.save_adapter(pipe, tmp_path / "baked", bake_scales=True)
    other = plain(str(lb.bundled("tiny-sd")))
    lb.load_adapter(other, tmp_path / "baked")
    assert (draw(other) - expected).abs().max().item() < 1e-3


def test_a_smaller_rank_says_its_error(tmp_path):
    report = lb.save_adapter("creatures", tmp_path / "small", rank=4)
    assert report.rank == 4 and 0.2 < report.error < 0.4 and "% off its ΔW" in str(report)
    resized = lb.resize_adapter("creatures", tmp_path / "share", energy=0.9)
    assert resized.total.lost / resized.total.energy <= 0.1
    before, after = (
        read_source(one).adapter.layers["unet"] for one in ("creatures", tmp_path / "share")
    )
    assert before.keys() == after.keys()


def test_of_several_the_name_is_asked(pipe, tmp_path):
    lb.load_adapter(pipe, "ink")
    lb.load_adapter(pipe, "mosaic")
    with pytest.raises(
        ValueError, match="say which adapter with name=; the pipeline has: ink, mosaic"
    ):
        lb.save_adapter(pipe, tmp_path / "x")
    assert lb.save_adapter(pipe, tmp_path / "x", name="mosaic").rank == 4


def test_an_unknown_format_writes_nothing(tmp_path):
    with pytest.raises(
        ValueError, match="unknown format 'onnx'; the formats are: diffusers, peft, kohya"
    ):
        lb.save_adapter("ink", tmp_path / "x", "onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_extracted_brings_the_base_to_the_tuned_model(tmp_path):
    base, tuned = plain(str(lb.bundled("tiny-sd"))), plain(str(lb.bundled("tiny-sd")))
    lb.load_adapter(tuned, "patch_cat")
    adapter = adapter_of(tuned, "patch_cat")
    lb.fuse(tuned, {"patch_cat": 1})
    expected = draw(tuned)
    tuned.save_pretrained(
        tmp_path / "tuned"
    )  # a model tuned as a whole, of which nothing else is known
    found = lb.extract_adapter(plain(str(tmp_path / "tuned")), base, rank=8)
    bases = base_weights(base, adapter)
    for part, layers in adapter.layers.items():
        assert layers.keys() == found.layers[part].keys()
        for module, layer in layers.items():
            delta = layer.delta(bases[part][module])
            assert (found.layers[part][module].delta() - delta).norm() <= 1e-3 * delta.norm() + 1e-5
    lb.load_adapter(
        base,
        lb.extract_adapter(plain(str(tmp_path / "tuned")), base, 8, tmp_path / "e.safetensors"),
    )
    assert (draw(base) - expected).abs().max().item() < 1e-2


def test_two_equal_pipelines_leave_nothing_to_extract(pipe):
    with pytest.raises(ValueError, match="nothing to extract"):
        lb.extract_adapter(pipe, lb.load_pipeline("tiny-sd", device="cpu"), rank=4)
