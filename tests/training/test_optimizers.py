import pytest
import torch

from conftest import quick_config, quick_dreambooth
from lorabook.training.optimizers import check_optimizer, make_optimizer, make_schedule, steps_in


def parts():
    return {part: [torch.nn.Parameter(torch.ones(1))] for part in ("unet", "text_encoder")}


def test_scale_lr_multiplies_by_batch_accumulation_and_processes():
    config = quick_config(scale_lr=True, gradient_accumulation_steps=4)
    assert [g["lr"] for g in make_optimizer(parts(), config, processes=2).param_groups] == [
        1e-3 * 4 * 2 * 2
    ] * 2


def test_text_encoders_have_a_rate_and_a_decay_of_their_own():
    config = quick_config(text_encoder_lr=5e-6, adam_weight_decay_text_encoder=0.0)
    groups = make_optimizer(parts(), config).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.01), (5e-6, 0.0)]


def test_prodigy_takes_its_own_settings():
    pytest.importorskip("prodigyopt")
    config = quick_dreambooth(
        optimizer="prodigy",
        learning_rate=1.0,
        adam_weight_decay=0.1,
        prodigy_safeguard_warmup=False,
    )
    optimizer = make_optimizer(parts(), config)
    assert (
        type(optimizer).__name__ == "Prodigy" and not optimizer.param_groups[0]["safeguard_warmup"]
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="bitsandbytes, which is not installed: pip install 'lorabook\\[lowbit\\]'"
    ):
        check_optimizer(quick_config(use_8bit_adam=True))


def test_warmup_rises_and_a_cosine_falls():
    config = quick_config(lr_scheduler="cosine", lr_warmup_steps=2)
    optimizer = make_optimizer({"unet": parts()["unet"]}, config)
    schedule, rates = make_schedule(optimizer, config, 10), []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (
        rates[0] == 0
        and rates[2] == max(rates) == 1e-3
        and rates[2:] == sorted(rates[2:], reverse=True)
    )


def test_steps_count_whole_accumulations():
    assert steps_in(
        quick_config(max_train_steps=None, num_train_epochs=3, gradient_accumulation_steps=4), 10
    ) == (9, 3)
    assert steps_in(quick_config(max_train_steps=7), 10) == (7, 10)
