import pickle
import subprocess

import pytest
import torch

from lorabook.lora.files import PICKLES, read_pickle


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
