import errno

import pytest
import torch
from safetensors.torch import load_file

from conftest import quick_train
from lorabook.training import callbacks, loop, trainer
from lorabook.training import run as run_module
from lorabook.training.callbacks import Callbacks
from lorabook.training.checkpoints import save_checkpoint


def train(tmp_path, **changes):
    return quick_train(tmp_path / "out", **changes)


def stopping(monkeypatch, step):
    """Let a stop button be pressed after a step."""
    after_step = Callbacks.after_step

    def stop(self):
        after_step(self)
        if self.trainer.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Callbacks, "after_step", stop)


def test_a_stop_button_saves_and_returns_the_run_so_far(tmp_path, monkeypatch):
    whole = quick_train(tmp_path / "whole", max_train_steps=6)
    stopping(monkeypatch, 3)
    run = train(tmp_path, max_train_steps=6)
    assert not run.finished and len(run.losses) == 3 and str(run).startswith("stopped: 3 steps")
    assert all(isinstance(loss, float) for loss in run.losses) and run.adapter.is_file()
    monkeypatch.undo()
    rest = train(tmp_path, max_train_steps=6, resume_from_checkpoint="latest")
    first, second = load_file(whole.adapter), load_file(rest.adapter)
    assert rest.finished and all(torch.equal(first[key], second[key]) for key in first)


def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "READ_EVERY", 1)
    losses = loop.training_loss
    calls = []

    def spoiled(*args):
        calls.append(1)
        return losses(*args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "training_loss", spoiled)
    with pytest.raises(
        FloatingPointError,
        match="at step 4 the loss is nan: the learning rate is usually too high, or fp16 "
        "overflows; the adapter of step 3 is kept in",
    ):
        train(tmp_path, max_train_steps=6)
    kept = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_a_full_disk_at_a_checkpoint_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def full(folder, state, *args):
        if state["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_checkpoint(folder, state, *args)

    monkeypatch.setattr(callbacks, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="checkpoint 2 could not be written .No space left"):
        run = train(tmp_path, checkpointing_steps=1)
    assert run.finished and sorted(p.name for p in run.folder.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
    ]


def test_a_full_disk_at_the_end_writes_the_adapter_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    write = trainer.write_lora

    def full(folder, *args):
        if folder == tmp_path / "out":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, *args)

    monkeypatch.setattr(trainer, "write_lora", full)
    with pytest.warns(
        UserWarning, match="cannot take the adapter .No space left on device.; it is written to"
    ):
        run = train(tmp_path)
    assert (
        run.adapter == tmp_path / "spare/out/pytorch_lora_weights.safetensors"
        and run.adapter.is_file()
    )


def test_a_failing_push_keeps_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("lorabook.training.setup.open_repository", lambda *args: "me/lora")

    def fail(*args, **kwargs):
        raise ConnectionError("me/lora: the Hub cannot be reached")

    monkeypatch.setattr(run_module, "push_adapter", fail)
    with pytest.warns(UserWarning, match="cannot be reached; push_adapter.* tries again"):
        run = train(tmp_path, push_to_hub=True)
    assert run.finished and run.adapter.is_file() and run.pushed is None
