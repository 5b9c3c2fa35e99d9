import gzip
import json
import pickle

import pytest
import torch
from safetensors.torch import save, save_file

import lorabook as lb
from loopback_site import Site
from lorabook.lora.files import kind_of
from lorabook.lora.source import base_model_of

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 151108832\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please log in</body></html>"
WEIGHTS = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 8)}
WHOLE = save(WEIGHTS)


def checkpoint():
    import io

    file = io.BytesIO()
    torch.save(WEIGHTS, file)
    return file.getvalue()


OTHER = {
    "web page": (PAGE, "a web page"),
    "web page with blanks": (b"\xef\xbb\xbf\n  " + PAGE.lower(), "a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page or XML"),
    "LFS": (LFS, "a Git LFS pointer.*git lfs pull"),
    "empty": (b"", "it is empty"),
    "JSON": (
        b'{"error":"Unauthorized","message":"log in"}',
        "it is JSON, which says .*Unauthorized",
    ),
    "JSON list": (b'["no"]', "it is JSON"),
    "text": (b"Not Found\n", "a text, which says Not Found"),
    "text in another alphabet": ("не найдено, не найдено".encode(), "a text, which says не"),
    "cut": (WHOLE[:-20], f"cut short, {len(WHOLE) - 20} of {len(WHOLE)} bytes"),
    "cut in its header": (WHOLE[:40], "cut short"),
    "zeros": (bytes(5000), "cut short or damaged"),
    "noise": (bytes(range(120, 250)) * 9, "cut short or damaged"),
    "zip": (b"PK\x03\x04" + bytes(200), "a zip archive"),
    "checkpoint": (checkpoint(), "a PyTorch checkpoint.*allow_pickle"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle: name it .ckpt"),
    "gzip": (gzip.compress(WHOLE), "a gzip archive"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    "GGUF": (b"GGUF" + bytes(50), "a GGUF file"),
    "offsets that go back": (
        (bad := json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode())
        and len(bad).to_bytes(8, "little") + bad,
        "it is damaged",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_no_adapter_file_is_called_what_it_is(case, tmp_path):
    content, match = OTHER[case]
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    for call in (
        lb.inspect_adapter,
        base_model_of,
        lambda path: lb.save_adapter(path, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(
            ValueError, match=f"it.safetensors cannot be read as safetensors: .*{match}"
        ) as told:
            call(path)
        assert len(str(told.value)) <= 400 and "\n" not in str(told.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pipeline_is_as_before_where_a_file_is_something_else(pipe, tmp_path):
    (tmp_path / "it.safetensors").write_bytes(LFS)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        lb.load_adapter(pipe, tmp_path)
    assert not hasattr(pipe.unet, "peft_config")


@pytest.mark.parametrize("case", ["LFS", "JSON", "text", "gzip", "picture", "checkpoint"])
def test_a_site_that_gives_something_else_is_told_what(case, tmp_path):
    content, match = OTHER[case]
    said = match.partition(".*")[0].removeprefix("it is ")
    with (
        Site() as site,
        pytest.raises(ValueError, match=f"/a gave no safetensors file: it is {said}") as told,
    ):
        lb.inspect_adapter(site.give("/a", content), cache_dir=str(tmp_path))
    assert len(str(told.value)) <= 400


@pytest.mark.parametrize(
    "content, match",
    [
        (LFS, "is no JSON that can be read: it is a Git LFS pointer"),
        (PAGE, "it is a web page"),
        (b"", "it is empty"),
        (b"{", "is no JSON"),
        (b"[1]", "holds no settings by name but .1."),
        (b"null", "holds no settings by name but null"),
        (b'"r"', 'holds no settings by name but "r"'),
        (b"\xff\xfe\x00", "is no JSON"),
    ],
)
def test_a_peft_config_that_is_something_else_is_called_that(tmp_path, content, match):
    save_file(WEIGHTS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"adapter_config.json {match}|adapter_config.json .*{match}"
    ):
        lb.inspect_adapter(tmp_path)


def test_json_with_a_brace_where_a_header_begins_is_still_json(tmp_path):
    (tmp_path / "a").write_bytes(b'{"why": {"error": "no"}}')
    assert kind_of(tmp_path / "a").startswith("JSON")
