import torch
from conftest import quick_config

from lorabook.training.loop import make_optimizer


def test_clipping_clips(tmp_path, monkeypatch):
    from accelerate import Accelerator

    import lorabook as lb
    norms, clip = [], Accelerator.clip_grad_norm_

    def spy(self, parameters, max_norm, *args):
        clip(self, parameters, max_norm, *args)
        norms.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", spy)
    lb.train_text_to_image(quick_config(output_dir=str(tmp_path), max_grad_norm=1e-3))
    assert len(norms) == 3 and all(0 < norm <= 1.001e-3 for norm in norms)


def test_scale_lr_multiplies_by_batch_and_accumulation():
    config = quick_config(scale_lr=True, gradient_accumulation_steps=4)
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(1))], config, processes=2)
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 4 * 2 * 2


def test_the_rate_falls_along_a_cosine(tmp_path):
    import lorabook as lb
    run = lb.train_text_to_image(quick_config(output_dir=str(tmp_path), lr_scheduler="cosine", lr_warmup_steps=0,
                                              max_train_steps=4))
    rates = [record["learning_rate"] for record in run.history]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-5
