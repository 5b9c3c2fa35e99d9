import torch

import lorabook as lb
from conftest import quick_config
from lorabook.training import run
from lorabook.training.families import family_of
from lorabook.training.lora import add_lora, trainable_parameters
from lorabook.training.merged import merged_products


def gradients(pipe, **changes):
    torch.manual_seed(0)
    carriers = add_lora(family_of(pipe), quick_config(target="all", alpha=6.0, **changes))
    for name, parameter in trainable_parameters(carriers):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    noisy, prompts = (
        torch.randn(2, 4, 16, 16),
        pipe.encode_prompt(["a cat"] * 2, "cpu", 1, False)[0],
    )

    def once():
        pipe.unet.zero_grad()
        pipe.unet(noisy, torch.tensor([10, 900]), prompts).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in trainable_parameters(carriers)}

    plain = once()
    with merged_products(carriers.values()):
        patched = sum("forward" in vars(module) for module in pipe.unet.modules())
        merged = once()
    return plain, merged, patched


def test_the_gradients_are_pefts(pipe):
    plain, merged, patched = gradients(pipe)
    assert patched == 279
    assert all(torch.allclose(plain[name], merged[name], rtol=1e-3, atol=1e-6) for name in plain)


def test_dropout_and_dora_are_left_to_peft(pipe):
    assert gradients(pipe, lora_dropout=0.1)[2] == 0
    assert gradients(lb.load_pipeline("tiny-sd", device="cpu"), use_dora=True)[2] == 0


def test_nothing_is_left_on_the_layers(pipe):
    gradients(pipe)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_a_run_learns_the_same_with_and_without(tmp_path, monkeypatch):
    from contextlib import nullcontext

    ours = lb.train_text_to_image(quick_config(output_dir=str(tmp_path / "a"), max_train_steps=6))
    monkeypatch.setattr(run, "merged_products", lambda models: nullcontext())
    assert torch.allclose(
        torch.tensor(ours.losses),
        torch.tensor(
            lb.train_text_to_image(
                quick_config(output_dir=str(tmp_path / "b"), max_train_steps=6)
            ).losses
        ),
        rtol=1e-3,
    )
