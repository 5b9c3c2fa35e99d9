import signal

import pytest
import torch
from safetensors.torch import load_file

from conftest import quick_train
from lorabook.training.callbacks import Callbacks


def losses(folder, **changes):
    return quick_train(folder, **changes).losses


def test_clipping_clips(tmp_path, monkeypatch):
    from accelerate import Accelerator

    norms, clip = [], Accelerator.clip_grad_norm_

    def spy(self, parameters, max_norm, *args):
        clip(self, parameters, max_norm, *args)
        norms.append(
            torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()
        )

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", spy)
    losses(tmp_path, max_grad_norm=1e-3)
    assert len(norms) == 3 and all(0 < norm <= 1.001e-3 for norm in norms)


def test_with_the_cache_on_or_off_the_losses_are_the_same_step_by_step(tmp_path):
    told = dict(random_flip=True, caption_dropout=0.3, noise_offset=0.1, max_train_steps=6)
    kept, anew = (
        losses(tmp_path / str(flag), cache_latents=flag, **told) for flag in (True, False)
    )
    assert kept == pytest.approx(anew, rel=1e-4)


def test_a_step_of_accumulated_batches_has_their_mean_loss(tmp_path):
    apart = losses(tmp_path / "a", max_train_steps=4, learning_rate=1e-12)
    together = losses(
        tmp_path / "b", max_train_steps=2, learning_rate=1e-12, gradient_accumulation_steps=2
    )
    assert together == pytest.approx([sum(apart[:2]) / 2, sum(apart[2:]) / 2], rel=1e-5)


def test_a_checkpointed_gradient_is_the_same_gradient(tmp_path):
    plain, saved = (
        load_file(quick_train(tmp_path / str(flag), gradient_checkpointing=flag).adapter)
        for flag in (False, True)
    )
    assert all(torch.allclose(plain[key], saved[key], atol=1e-4) for key in plain)


def test_an_interrupt_waits_for_the_end_of_a_step(tmp_path, monkeypatch):
    steps, step = [], torch.optim.AdamW.step

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        step(self, *args)
        steps.append(1)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    run = quick_train(tmp_path, max_train_steps=5)
    assert not run.finished and len(run.losses) == len(steps) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_stops_the_run_all_the_same(tmp_path, monkeypatch):
    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    after_step = Callbacks.after_step

    def swallow(callbacks):
        after_step(callbacks)
        Swallows()

    monkeypatch.setattr(Callbacks, "after_step", swallow)
    run = quick_train(tmp_path, max_train_steps=5)
    assert not run.finished and len(run.losses) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
