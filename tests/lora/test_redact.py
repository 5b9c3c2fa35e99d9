import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorabook as lb
from lorabook.lora.metadata import outgoing, outgoing_command, outgoing_file, public_name, shareable


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/me/run", "run"),
        ("/home/me", ""),
        ("~", ""),
        ("~/loras/x.safetensors", "x.safetensors"),
        ("C:\\Users\\John Smith\\loras\\a.ckpt", "a.ckpt"),
        ("C:/Users/me", ""),
        ("D:\\m\\v1-5.ckpt", "v1-5.ckpt"),
        ("\\\\nas\\share\\me\\x.ckpt", "x.ckpt"),
        ("file:///home/me/a b/x.png", "x.png"),
        ("file://host/share/x.st", "x.st"),
        ("$HOME/x/y", "y"),
        ("%USERPROFILE%\\x\\y", "y"),
        ("./runs/me", "me"),
        ("runs/me/last", "last"),
        ("/root/.cache/huggingface/hub/models--someone--base/snapshots/0a1b", "someone/base"),
        ("from C:\\Users\\John Smith\\pics with rank 4", "from pics with rank 4"),
        ("see /home/John Smith/x, and dir:/mnt/me/y.", "see x, and dir:y."),
        ("--output_dir=/home/me/run", "--output_dir=run"),
    ],
)
def test_of_a_path_only_its_last_part_is_told(given, told):
    assert shareable(given) == told


@pytest.mark.parametrize(
    "text",
    [
        "a token ring",
        "black/white photo",
        "a cat (1/2) and/or a dog",
        "w/ hat",
        "hatsune_miku_\\(cosplay\\)",
        "\\(cat\\)",
        "a <lora:x:1>, </b>",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "https://civitai.com/models/1?modelVersionId=2",
        "networks.lora",
        "cute~ cat ~ dog",
        "2024-01-01T10:00:00",
        "(cat:1.2)",
        "8:30",
        "a / b",
        "1,0,0",
    ],
)
def test_prompts_hub_ids_and_addresses_stay_as_they_are(text):
    assert shareable(text) == text


def test_tokens_go_and_what_only_has_the_word_in_its_name_stays():
    kept = {
        "tokenizer_max_length": 77,
        "tokenizer_name": "a/b",
        "prompt": "a token ring",
        "max_token_length": 225,
        "placeholder_token": "<cat>",
        "keep_tokens": 1,
        "num_vectors_per_token": 2,
    }
    gone = {
        "hub_token": "x",
        "token": "y",
        "wandb_api_key": "z",
        "password": "w",
        "note": "hf_" + "a" * 34,
        "tracker": "token=abc",
        "command": "--hub_token abc --rank 4",
    }
    assert shareable(kept | gone) == kept and shareable(
        ["a", *gone.values()][:1] + ["hf_" + "a" * 34]
    ) == ["a"]


def test_an_address_loses_its_token_and_its_user():
    assert shareable("https://me:pw@x.org/a?token=abc") == "https://x.org/a"


def test_kohyas_metadata_lose_their_paths_and_keep_their_settings():
    kept = {
        "ss_network_dim": "32",
        "ss_output_name": "my_style",
        "ss_network_args": '{"conv_dim": "4"}',
    }
    told = kept | {
        "ss_sd_model_name": "C:/Users/me/v1-5.safetensors",
        "ss_training_comment": "in C:\\Users\\me\\pics",
        "ss_dataset_dirs": json.dumps({"C:\\Users\\me\\10_sks": {"img_count": 9}}),
    }
    assert outgoing(told) == kept | {
        "ss_sd_model_name": "v1-5.safetensors",
        "ss_training_comment": "in pics",
        "ss_dataset_dirs": '{"10_sks": {"img_count": 9}}',
    }


def test_a_loras_layers_are_left_alone_where_they_look_like_paths():
    told = {
        "unet.target_modules": ".*\\.attn\\d/to_k",
        "unet.base_model_name_or_path": "/home/me/sd15",
    }
    found = json.loads(
        outgoing({"lora_adapter_metadata": json.dumps(told)})["lora_adapter_metadata"]
    )
    assert found == told | {"unet.base_model_name_or_path": "sd15"}


def test_a_file_goes_out_with_the_same_weights_and_without_paths(tmp_path):
    weights = {"b": torch.randn(3, 2), "a": torch.randn(5).half()}
    save_file(weights, tmp_path / "in.safetensors", {"ss_resume": "/home/me/last", "format": "pt"})
    (tmp_path / "out.safetensors").write_bytes(outgoing_file(tmp_path / "in.safetensors"))
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"ss_resume": "last", "format": "pt"}
    assert struct.unpack("<Q", (tmp_path / "out.safetensors").read_bytes()[:8])[0] % 8 == 0


def test_a_file_that_names_no_path_goes_out_as_it_is(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"note": "kept"})
    assert outgoing_file(tmp_path / "a.safetensors") == (tmp_path / "a.safetensors").read_bytes()


def test_a_command_keeps_what_repeats_it():
    assert outgoing_command(
        "train --hub_token hf_b --TOKEN=x --tokenizer_max_length=77 --prompt='a token ring' "
        "--out=/home/me/run --flag"
    ) == ("train --tokenizer_max_length=77 --prompt='a token ring' --out=run --flag")


def test_a_folder_is_called_by_its_name_or_by_the_hub_id_of_that_name(tmp_path):
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text('{"_name_or_path": "someone/base"}')
    assert (
        public_name(str(tmp_path / "base")) == "someone/base"
        and public_name(str(tmp_path / "other")) == "other"
    )
    assert public_name("tiny-sd") == "tiny-sd" and public_name("~nobody-here/x") == "x"


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_what_is_saved_from_elsewhere_names_no_path(tmp_path, form):
    save_file(
        load_file(lb.bundled("adapters/mosaic") / "pytorch_lora_weights.safetensors"),
        tmp_path / "x.safetensors",
        {
            "ss_sd_model_name": "C:\\Users\\secretuser\\v1-5.safetensors",
            "base_model": "/home/secretuser/base",
        },
    )
    lb.save_adapter(tmp_path / "x.safetensors", tmp_path / "saved", form)
    files = [path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert files and not any(b"secretuser" in content for content in files)
    assert lb.inspect_adapter(tmp_path / "saved").base_model == "base"
