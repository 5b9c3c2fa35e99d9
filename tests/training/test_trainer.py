import pytest
import torch

from conftest import quick_config, quick_dreambooth, quick_train
from lorabook.training.trainer import make_optimizer


def parameters():
    names = ("unet.weight", "text_encoder.weight")
    return {name: torch.nn.Parameter(torch.ones(1)) for name in names}


def test_scale_lr_multiplies_by_batch_accumulation_and_processes():
    config = quick_config(scale_lr=True, gradient_accumulation_steps=4)
    groups = make_optimizer(parameters(), config, processes=2).param_groups
    assert [group["lr"] for group in groups] == [1e-3 * 4 * 2 * 2] * 2


def test_text_encoders_have_a_rate_and_a_decay_of_their_own():
    config = quick_config(text_encoder_lr=5e-6, adam_weight_decay_text_encoder=0.0)
    groups = make_optimizer(parameters(), config).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.01), (5e-6, 0.0)]


def test_prodigy_takes_its_own_settings():
    pytest.importorskip("prodigyopt")
    config = quick_dreambooth(
        optimizer="prodigy",
        learning_rate=1.0,
        adam_weight_decay=0.1,
        prodigy_safeguard_warmup=False,
    )
    optimizer = make_optimizer(parameters(), config)
    assert type(optimizer).__name__ == "Prodigy"
    assert not optimizer.param_groups[0]["safeguard_warmup"]


def test_warmup_rises_and_a_cosine_falls(tmp_path):
    run = quick_train(tmp_path, lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=6)
    rates = [record["learning_rate"] for record in run.history]
    assert rates[0] == 0 and rates[2] == max(rates) == 1e-3
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_steps_count_whole_accumulations(tmp_path):
    run = quick_train(
        tmp_path, max_train_steps=None, num_train_epochs=2, gradient_accumulation_steps=2
    )
    assert len(run.losses) == 4  # two of three batches in an epoch, the last filled up


def test_what_a_run_will_take_is_told(tmp_path, capsys):
    run = quick_train(tmp_path, max_train_steps=2, train_batch_size=3)
    assert (
        "6 images, 2 steps of 3 (1.0 epochs); 38,656 parameters learn, an adapter of 0.2 MB\n"
        in capsys.readouterr().out
    )
    assert run.adapter.stat().st_size == pytest.approx(4 * 38656, rel=0.5)
