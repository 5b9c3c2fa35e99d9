import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lorabook.adapters.files import find_adapter, read_adapter, write_adapter


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


def test_a_damaged_file_is_named(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="a.safetensors cannot be read"):
        read_adapter(tmp_path / "a.safetensors")


def test_weights_that_are_not_finite_are_named(tmp_path):
    save_file({"unet.x.lora_A.weight": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not finite.*unet.x.lora_A.weight"):
        read_adapter(tmp_path / "a.safetensors")


def test_a_written_file_holds_weights_and_metadata(tmp_path):
    path = write_adapter(tmp_path / "new" / "a.safetensors", {"unet.x": torch.ones(2)},
                         config={"unet": {"r": 4, "target_modules": {"b", "a"}}}, about={"base_model": "tiny-sd"})
    weights, metadata = read_adapter(path)
    assert torch.equal(weights["unet.x"], torch.ones(2)) and metadata["base_model"] == "tiny-sd"
    assert metadata["lora_adapter_metadata"] == '{"unet.r": 4, "unet.target_modules": ["a", "b"]}'


def test_settings_as_peft_has_them_anyway_are_not_written(tmp_path):
    """An older PEFT refuses a file that diffusers opens by a name it does not know: `kasa_config` and the like."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], use_rslora=True).to_dict()
    path = write_adapter(tmp_path / "x.safetensors", {"unet.a": torch.ones(1)}, config={"unet": config}, about={})
    told = json.loads(read_adapter(path)[1]["lora_adapter_metadata"])
    assert told == {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"], "unet.use_rslora": True,
                    "unet.peft_type": "LORA"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", {"x": torch.ones(1)}, config={}, about={})
    with pytest.raises(AttributeError):
        write_adapter(path, {"x": "no tensor"}, config={}, about={})
    assert load_file(path)["x"].item() == 1
