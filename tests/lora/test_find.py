"""Whatever belongs to an adapter is found in a folder as on the Hub."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save, save_file

import lorabook as lb
from lorabook.live.inject import source_of
from lorabook.lora.formats.write import write_adapter
from lorabook.lora.source import find_adapter, read_adapter, read_source

REPO, SD15 = "someone/peft", "stable-diffusion-v1-5/stable-diffusion-v1-5"
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CARD = b"---\ninstance_prompt: a photo of sks dog\n---\n"


def weights(prefix="base_model.model."):
    generator = torch.Generator().manual_seed(0)
    return save(
        {
            f"{prefix}{Q}.lora_A.weight": torch.randn(4, 128, generator=generator),
            f"{prefix}{Q}.lora_B.weight": torch.randn(128, 4, generator=generator),
        }
    )


def adapter(inside="", name="adapter_model.safetensors", **told):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": SD15} | told
    return {
        f"{inside}{name}": weights(),
        f"{inside}adapter_config.json": json.dumps(config).encode(),
        "README.md": CARD,
    }


FORMS = {
    "at the root": (adapter(), {}),
    "in a subfolder": (adapter("ikea/"), {"subfolder": "ikea"}),
    "further down": (adapter("a/b/"), {"subfolder": "a/b"}),
    "by its name": (adapter(name="mine.safetensors"), {"weight_name": "mine.safetensors"}),
    "by a name with its folder": (
        adapter("ikea/"),
        {"weight_name": "ikea/adapter_model.safetensors"},
    ),
    "by a name in a subfolder": (
        adapter("a/", "x.safetensors") | {"a/y.safetensors": weights()},
        {"subfolder": "a", "weight_name": "x.safetensors"},
    ),
    "by component": (adapter("unet/"), {}),
    "by component in a subfolder": (adapter("x/unet/"), {"subfolder": "x"}),
    "another revision": (adapter(), {"revision": "v1"}),
    "rslora": (adapter(use_rslora=True), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_hub_and_a_folder_give_the_same_adapter(hub, tmp_path, form):
    files, find = FORMS[form]
    hub.repos[REPO] = files
    folder = tmp_path / "peft"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    here, there = (read_source(source, **find).adapter for source in (folder, REPO))
    layers = [found.layers["unet"][Q] for found in (here, there)]
    assert {layer.scaling for layer in layers} == {8 if form == "rslora" else 4}
    for told in ("format", "base_model", "trigger_words", "missing", "notes", "ignored"):
        assert getattr(here, told) == getattr(there, told)
    assert here.format == "PEFT" and here.base_model == SD15 and not here.missing
    known = {key: value for key, value in find.items() if key != "revision"}
    assert lb.base_model_of(folder, **known) == lb.base_model_of(REPO, **find) == SD15
    assert str(lb.inspect_adapter(folder, **known)) == str(lb.inspect_adapter(REPO, **find))
    assert (
        read_source(REPO, local_files_only=True, **find).adapter.layers["unet"][Q].scaling
        == layers[0].scaling
    )


def test_the_hub_is_asked_once_for_what_there_is(hub):
    hub.repos[REPO] = adapter("ikea/")
    read_source(REPO, subfolder="ikea")
    assert sum("/api/models/" in path for _, path, _ in hub.requests) == 1


def test_the_address_of_a_file_on_the_hub_brings_its_settings_along(hub, pipe):
    hub.repos[REPO] = adapter("ikea/")
    file = f"{hub.url}/{REPO}/resolve/main/ikea/adapter_model.safetensors"
    address = f"{file}?download=true&token=hf_secret"
    report = lb.load_adapter(pipe, address, "it")
    assert report.alpha == (16,) and report.base_model == SD15
    assert source_of(pipe, "it") == file


def test_the_hubs_copy_is_read_whole_without_network(hub):
    hub.repos[REPO] = adapter()
    read_source(REPO)
    hub.server.shutdown()
    hub.server.server_close()
    assert read_source(REPO).adapter.layers["unet"][Q].scaling == 4


@pytest.mark.parametrize(
    "metadata, alpha", [({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 2}'}, 2), (None, 1)]
)
def test_a_file_that_tells_its_own_strength_is_not_told_it_by_what_lies_beside(
    tmp_path, metadata, alpha
):
    from safetensors.torch import load, save_file

    held = load(weights("unet."))
    save_file(
        held if metadata else held | {f"unet.{Q}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
        metadata,
    )
    (tmp_path / "adapter_config.json").write_text(
        '{"r": 4, "lora_alpha": 16, "init_lora_weights": "corda"}'
    )
    assert read_source(tmp_path).adapter.layers["unet"][Q].alpha == alpha


def test_a_file_that_a_repository_lacks_is_told_with_those_it_has(hub):
    hub.repos[REPO] = adapter()
    with pytest.raises(
        FileNotFoundError,
        match="someone/peft has no file x.safetensors; it has: README.md, adapter_config",
    ):
        read_source(REPO, weight_name="x.safetensors")


def test_one_file_in_a_folder_is_found(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "some.safetensors")
    assert find_adapter(tmp_path) == tmp_path / "some.safetensors"


def test_several_files_are_listed(tmp_path):
    for name in "ab":
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="a.safetensors, b.safetensors"):
        find_adapter(tmp_path)
    assert find_adapter(tmp_path, weight_name="b.safetensors").name == "b.safetensors"


def test_a_missing_adapter_says_what_was_looked_for():
    with pytest.raises(FileNotFoundError, match="'nothing' not found.*no bundled"):
        find_adapter("nothing")


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_a_pickle_file_is_refused(tmp_path, ending):
    (tmp_path / f"lora{ending}").write_bytes(b"pickle")
    for source in (tmp_path, tmp_path / f"lora{ending}"):
        with pytest.raises(ValueError, match=f"lora{ending} is a pickle file.*safetensors"):
            find_adapter(source)


def test_a_written_file_holds_weights_and_metadata(tmp_path):
    path = write_adapter(
        tmp_path / "new" / "a.safetensors",
        {"unet.x": torch.ones(2)},
        config={"unet": {"r": 4, "target_modules": {"b", "a"}}},
        about={"base_model": "tiny-sd"},
    )
    weights, metadata = read_adapter(path)
    assert torch.equal(weights["unet.x"], torch.ones(2)) and metadata["base_model"] == "tiny-sd"
    assert metadata["lora_adapter_metadata"] == '{"unet.r": 4, "unet.target_modules": ["a", "b"]}'


def test_settings_as_peft_has_them_anyway_are_not_written(tmp_path):
    """An older PEFT refuses a file that diffusers opens by a name it lacks, as `kasa_config`."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], use_rslora=True).to_dict()
    path = write_adapter(
        tmp_path / "x.safetensors", {"unet.a": torch.ones(1)}, config={"unet": config}, about={}
    )
    assert json.loads(read_adapter(path)[1]["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 2,
        "unet.target_modules": ["to_q"],
        "unet.use_rslora": True,
        "unet.peft_type": "LORA",
    }


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", {"x": torch.ones(1)}, config={}, about={})
    with pytest.raises(AttributeError):
        write_adapter(path, {"x": "no tensor"}, config={}, about={})
    assert load_file(path)["x"].item() == 1
