import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorabook as lb
from conftest import quick_config, quick_train
from loopback_hub import TOKEN, LoopbackHub
from lorabook.blocks import block_of
from lorabook.live.layers import layers_of
from lorabook.training.families import family_of
from lorabook.training.lora import (
    add_lora,
    merged_products,
    target_layers,
    trainable_parameters,
)
from lorabook.worlds import DATA


def test_only_the_named_blocks_are_adapted(tmp_path, pipe):
    run = quick_train(tmp_path / "x", target_blocks=["mid", "up.1"], target="all")
    lb.load_adapter(pipe, run, "x")
    assert {block_of(name) for name in layers_of(pipe, "x")["unet"]} == {"mid", "up.1"}


def test_a_rank_larger_than_a_layer_names_the_layer_and_the_most(pipe):
    with pytest.raises(
        ValueError,
        match=r"rank 33 is larger than layer down_blocks.0.* of shape \(32, 32\).*up to 32",
    ):
        target_layers(family_of(pipe), quick_config(rank=33))


def test_only_lora_learns_and_in_float32(pipe):
    pipe.unet.to(torch.bfloat16)
    models = add_lora(family_of(pipe), quick_config(train_text_encoder=True))
    found = trainable_parameters(models)
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in found.items())
    assert {name.split(".")[0] for name in found} == {"unet", "text_encoder"}
    assert not any(p.requires_grad for p in pipe.vae.parameters())


def test_a_dora_is_trained_and_loads(tmp_path, pipe):
    run = quick_train(tmp_path / "dora", use_dora=True, target="attention+ff")
    assert sum("magnitude" in key for key in load_file(run.adapter)) == 160
    assert lb.load_adapter(pipe, run, "x").kinds == ("DoRA", "LoRA")


def test_kohyas_keys_hold_the_same_weights_and_the_alpha(tmp_path):
    run = quick_train(tmp_path, output_kohya_format=True, alpha=6.0)
    ours, kohya = (
        load_file(run.adapter),
        load_file(run.folder / "pytorch_lora_weights_kohya.safetensors"),
    )
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert torch.equal(ours[key], kohya[f"{flat}.lora_down.weight"]) and kohya[f"{flat}.alpha"] == 6
    assert len(kohya) == len(ours) * 3 // 2


def test_kohyas_file_loads_in_diffusers_to_the_same_picture(tmp_path, pipe):
    run = quick_train(tmp_path, output_kohya_format=True, alpha=6.0, learning_rate=0.1)
    pictures = []
    for name in (run.adapter.name, "pytorch_lora_weights_kohya.safetensors"):
        pipe.load_lora_weights(str(tmp_path), weight_name=name)
        pictures.append(
            pipe(
                "a red cat",
                num_inference_steps=2,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
        pipe.unload_lora_weights()
    assert abs(pictures[0] - pictures[1]).max() < 0.02


def test_an_adapter_names_no_folder_of_this_machine_and_neither_does_what_is_pushed(
    tmp_path, creature_folder, monkeypatch
):
    base = tmp_path / "models/my-base"
    shutil.copytree(DATA / "tiny-sd", base)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        run = quick_train(
            tmp_path / "secret-run",
            pretrained_model_name_or_path=str(base),
            dataset_name=None,
            train_data_dir=str(creature_folder),
            max_train_steps=1,
            cache_dir=str(tmp_path / "secret-cache"),
            output_kohya_format=True,
            pretrained_vae_model_name_or_path=str(base / "vae"),
            alpha=6.0,
            push_to_hub=True,
            hub_model_id="mine",
        )
        sent = [content for files in hub.repos.values() for content in files.values()]
    written = [path.read_bytes() for path in run.folder.rglob("pytorch_lora_weights*.safetensors")]
    assert len(written) == 4 and len(sent) == 2
    for content in (*written, *sent):
        assert not any(
            part.encode() in content for part in (*tmp_path.parts[2:], str(Path.home()), "secret-")
        )
    with safe_open(run.adapter, "pt") as file:
        metadata = file.metadata()
    training, lora = json.loads(metadata["training"]), json.loads(metadata["lora_adapter_metadata"])
    assert (metadata["base_model"], training["pretrained_model_name_or_path"]) == (
        "my-base",
        "my-base",
    )
    assert (lora["unet.r"], lora["unet.lora_alpha"]) == (2, 6.0)
    assert (training["rank"], training["learning_rate"], training["max_train_steps"]) == (
        2,
        1e-3,
        1,
    )
    assert f"--output_dir={run.folder}" in (run.folder / "command.txt").read_text()


def gradients(pipe, **changes):
    """The LoRA's gradients by PEFT's products and by merged ones, and the number of the latter."""
    models = add_lora(family_of(pipe), quick_config(target="all", alpha=6.0, **changes))
    parameters = trainable_parameters(models)
    torch.manual_seed(0)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    noisy, prompts = torch.randn(2, 4, 16, 16), family_of(pipe).encode_prompts(["a cat"] * 2)[0]

    def once():
        pipe.unet.zero_grad()
        pipe.unet(noisy, torch.tensor([10, 900]), prompts).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    def merged_layers():
        return sum("forward" in vars(module) for module in pipe.unet.modules())

    plain = once()
    with merged_products(models.values()):
        merged, count = once(), merged_layers()
    assert merged_layers() == 0
    return plain, merged, count


def test_merged_products_have_pefts_gradients_and_leave_nothing_behind(pipe):
    plain, merged, count = gradients(pipe)
    assert count == 279
    assert all(torch.allclose(plain[name], merged[name], rtol=1e-3, atol=1e-6) for name in plain)


@pytest.mark.parametrize("changes", [dict(lora_dropout=0.1), dict(use_dora=True)])
def test_dropout_and_dora_are_left_to_peft(pipe, changes):
    assert gradients(pipe, **changes)[2] == 0
