"""Files that are something else, and old pickles."""

import gzip
import json
import pickle
import subprocess

import pytest
import torch
from safetensors.torch import save, save_file

import lorabook as lb
from loopback_site import Site
from lorabook.lora.files import PICKLES, kind_of, read_pickle
from lorabook.lora.source import base_model_of

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 151108832\n"
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


def write(path, held):
    torch.save(held, path)
    return path


@pytest.mark.parametrize("ending", PICKLES)
def test_weights_come_back(tmp_path, ending):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    found = read_pickle(write(tmp_path / f"lora{ending}", weights))
    assert found.keys() == weights.keys() and all(
        torch.equal(found[key], weights[key]) for key in weights
    )
    assert found["b"].dtype == torch.float16


def test_weights_of_before_the_zip_form_come_back(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(tmp_path / "old.bin")["a"], torch.ones(2))


def test_a_checkpoint_is_unwrapped(tmp_path):
    held = {"epoch": 3, "optimizer": {"lr": 1e-3}, "state_dict": {"a": torch.ones(1), "step": 7}}
    assert read_pickle(write(tmp_path / "a.ckpt", held)) == {"a": torch.ones(1)}


def test_a_trainable_parameter_comes_back_as_a_plain_tensor(tmp_path):
    found = read_pickle(write(tmp_path / "a.pt", {"a": torch.nn.Parameter(torch.ones(1))}))["a"]
    assert not found.requires_grad


class Runs:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.target)],)


@pytest.mark.parametrize(
    "wrap", [lambda it: it, lambda it: {"a": torch.ones(1), "b": it}, lambda it: {"state_dict": it}]
)
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, wrap):
    path = write(tmp_path / "evil.pt", wrap(Runs(tmp_path / "ran")))
    with pytest.raises(ValueError, match="evil.pt cannot be opened as weights alone.*safetensors"):
        read_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match="evil.pkl cannot be opened as weights alone"):
        read_pickle(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_file_that_is_cut_short_is_named(tmp_path, cut):
    path = write(tmp_path / "a.bin", {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="a.bin cannot be opened.*damaged"):
        read_pickle(path)


@pytest.mark.parametrize(
    "held", [[torch.ones(1)], torch.ones(1), {}, {"epoch": 3}, {1: torch.ones(1)}]
)
def test_what_has_no_weights_by_name_is_an_error(tmp_path, held):
    with pytest.raises(ValueError, match="a.bin holds no weights by name.*safetensors"):
        read_pickle(write(tmp_path / "a.bin", held))


def test_other_things_among_the_weights_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="a.bin holds other things than weights, for example 'names'"
    ):
        read_pickle(write(tmp_path / "a.bin", {"a": torch.ones(1), "names": ["x"]}))


def test_an_error_never_advises_to_run_what_is_inside(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened") as told:
        read_pickle(write(tmp_path / "evil.pt", Runs(tmp_path / "ran")))
    assert "weights_only" not in str(told.value) and len(str(told.value)) <= 400


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.bin"):
        read_pickle(tmp_path / "none.bin")
