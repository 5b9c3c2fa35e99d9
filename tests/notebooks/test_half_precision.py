"""What notebooks 07 and 08 assert of pictures that are the same to rounding, in half precision, on
a small UNet.
"""

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import lorabook as lb

SEED, ONE = {"seed": 1}, {"seed": [1]}


def as_loha(source, target):
    """The LoRA of a Kohya file as the first half of a LoHa; the second half is ones, as in notebook
    08.
    """
    weights, loha = load_file(source), {}
    for stem in (key.removesuffix(".alpha") for key in weights if key.endswith(".alpha")):
        up, down = (
            weights[f"{stem}.lora_{side}.weight"].flatten(1).clone() for side in ("up", "down")
        )
        loha |= {
            f"{stem}.hada_w1_a": up,
            f"{stem}.hada_w1_b": down,
            f"{stem}.alpha": weights[f"{stem}.alpha"],
            f"{stem}.hada_w2_a": torch.ones(len(up), 1),
            f"{stem}.hada_w2_b": torch.ones(1, down.shape[1]),
        }
    save_file(loha, target)
    return target


def draw(pipe, scales, column):
    lb.set_scales(pipe, scales, only=True)
    grid = lb.sweep(
        pipe,
        "a red cat",
        columns=column,
        num_inference_steps=2,
        **({} if "seed" in column else SEED),
    )
    return [np.asarray(image, float) for image in grid.images[0]]


def test_a_loha_in_a_batch_and_an_adapter_fused_draw_as_the_adapter_does_to_rounding(
    small, tmp_path
):
    lb.save_adapter(small, tmp_path / "lora.safetensors", "kohya", name="random")
    lb.load_adapter(
        small.to(torch.float16),
        as_loha(tmp_path / "lora.safetensors", tmp_path / "loha.safetensors"),
    )
    [trained], (bare, _, same) = (
        draw(small, {"random": 1}, ONE),
        draw(small, {"loha": 1}, {"loha": [0, 0.5, 1]}),
    )
    lb.set_scales(small, {"random": 1}, only=True)
    with lb.fused(small):
        [fused] = draw(small, {}, ONE)
    rounding = 255 * lb.tolerance(torch.float16)
    assert (
        abs(same - trained).mean() < rounding > abs(fused - trained).mean()
        and abs(bare - trained).mean() > rounding
    )
