import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from safetensors.torch import load_file
from torch import nn

import lorabook as lb

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture
def loaded(small):
    small.base = draw_without(small)
    return small


def draw_without(pipe):
    lb.disable_adapters(pipe)
    picture = draw(pipe)
    lb.enable_adapters(pipe)
    return picture


NEEDS_WEIGHTS = {
    "save": lambda pipe, folder: lb.save_adapter(pipe, folder / "saved"),
    "resize": lambda pipe, folder: lb.resize_adapter(pipe, folder / "small", rank=1),
    "extract": lambda pipe, folder: lb.extract_adapter(pipe, pipe, 2),
    "fuse": lambda pipe, folder: lb.fuse(pipe),
    "blend": lambda pipe, folder: lb.blend(pipe, {"random": 0.5}, new_name="half"),
    "checksum": lambda pipe, folder: lb.base_checksum(pipe),
    "move": lambda pipe, folder: lb.move_adapter(pipe, "random", "cpu"),
    "swap": lambda pipe, folder: lb.swap_adapter(pipe, "random", folder / "other"),
    "load": lambda pipe, folder: lb.load_adapter(pipe, folder / "other", "more"),
}


def offload(pipe, how: str, folder) -> None:
    if how == "disk_offload":
        disk_offload(pipe.unet, str(folder / "disk"), execution_device="cpu")
    elif how == "group offload to disk":
        pipe.unet.enable_group_offload(
            "cpu", offload_type="leaf_level", offload_to_disk_path=str(folder / "groups")
        )
    else:
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "group offload to disk"])
def test_what_needs_offloaded_weights_says_so(loaded, tmp_path, how):
    lb.save_adapter(loaded, tmp_path / "other")
    before = draw(loaded)
    offload(loaded, how, tmp_path)
    for call in NEEDS_WEIGHTS.values():
        with pytest.raises(
            ValueError,
            match="the weights of unet are offloaded.*(remove_all_hooks|enable_group_offload)",
        ):
            call(loaded, tmp_path)
    lb.set_scales(loaded, {"random": 0.5})
    assert not torch.equal(draw(loaded), before)
    lb.set_scales(loaded, {"random": 1})
    assert lb.list_adapters(loaded)["random"].active and torch.equal(draw(loaded), before)
    lb.remove_adapter(loaded, "random")
    assert torch.equal(draw(loaded), loaded.base)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_the_remedy_brings_the_weights_back(loaded, tmp_path, how):
    checksum, before = lb.base_checksum(loaded), draw(loaded)
    lb.fuse(loaded)
    offload(loaded, how, tmp_path)
    with pytest.raises(ValueError, match="offloaded"):
        lb.unfuse(loaded)
    loaded.remove_all_hooks()
    lb.unfuse(loaded)
    assert lb.base_checksum(loaded) == checksum and torch.equal(draw(loaded), before)


@pytest.mark.parametrize("how", ["model", "group by leaf", "group by block"])
def test_weights_that_only_wait_on_the_cpu_are_worked_with(loaded, tmp_path, how):
    checksum, before = lb.base_checksum(loaded), draw(loaded)
    if how == "model":
        loaded.unet, _ = cpu_offload_with_hook(loaded.unet, "cpu")
    else:
        loaded.unet.enable_group_offload(
            "cpu", offload_type=f"{how.split()[-1]}_level", num_blocks_per_group=1
        )
    lb.save_adapter(loaded, tmp_path / "other")
    lb.fuse(loaded)
    assert (draw(loaded) - before).abs().max().item() < 1e-4
    lb.unfuse(loaded)
    assert lb.base_checksum(loaded) == checksum and torch.equal(draw(loaded), before)
    lb.load_adapter(loaded, tmp_path / "other", "more")
    lb.remove_adapter(loaded, "random")
    assert torch.equal(draw(loaded), before)


def test_layers_that_come_after_group_offloading_are_offloaded_too(small, tmp_path):
    lb.save_adapter(small, tmp_path / "other")
    small.unet.enable_group_offload("cpu", offload_type="leaf_level")
    lb.load_adapter(small, tmp_path / "other", "more")
    halves = [module for name, module in small.unet.named_modules() if name.endswith("lora_A.more")]
    assert halves and all(half._diffusers_hook.get_hook("group_offloading") for half in halves)


# 8 bits


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("first", ["cast", "load"])
def test_weights_kept_in_8_bits_are_fused_and_given_back_exactly(small, tmp_path, dtype, first):
    lb.save_adapter(small, tmp_path / "other")
    if first == "cast":
        lb.unload_adapters(small)
    small.unet.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)
    if first == "cast":
        lb.load_adapter(small, tmp_path / "other", "random")
    lb.set_scales(small, {"random": 0.8})
    checksum, before = lb.base_checksum(small), draw(small)
    with pytest.warns(UserWarning, match="rounded to it too.*unfuse is exact"):
        report = lb.fuse(small)
    assert f"rounded to {str(dtype)[6:]}" in str(report) and not torch.equal(draw(small), before)
    weight = small.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == dtype and weight.float().isfinite().all()
    lb.unfuse(small)
    assert lb.base_checksum(small) == checksum and torch.equal(draw(small), before)


def test_a_scale_beyond_8_bits_is_refused(small):
    small.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    checksum = lb.base_checksum(small)
    with pytest.raises(ValueError, match="infinite in float8_e4m3fn; give a smaller scale"):
        lb.fuse(small, {"random": 1e6})
    assert lb.base_checksum(small) == checksum


def test_adapters_on_8_bits_are_saved_blended_swept_and_extracted(small, tmp_path):
    lb.save_adapter(small, tmp_path / "before")
    small.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    lb.save_adapter(small, tmp_path / "after")
    before, after = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        for name in ("before", "after")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(after[key], value) for key, value in before.items()
    )
    grid = lb.sweep(small, "a cat", columns={"random": [0, 1]}, num_inference_steps=2)
    assert len(grid.images[0]) == 2
    base = lb.load_pipeline("tiny-sd", device="cpu")
    base.register_modules(unet=type(small.unet).from_config(small.unet.config))
    assert lb.extract_adapter(small, base, 2).layers["unet"]
    lb.blend(small, {"random": 0.5}, new_name="mix")
    half = draw(small)
    lb.remove_adapter(small, "mix")
    lb.set_scales(small, {"random": 0.5})
    assert (draw(small) - half).abs().max().item() < 1e-4


# quantised


class Packed(nn.Linear):
    """As bitsandbytes keeps a layer in 4 bits: a weight of bytes in another shape."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.kept = layer
        self.weight = nn.Parameter(
            torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )

    def forward(self, x):
        return self.kept(x)


def test_a_quantised_base_carries_adapters_and_refuses_to_fuse_them(small, tmp_path):
    before = draw(small)
    lb.save_adapter(small, tmp_path / "other")
    lb.unload_adapters(small)
    attention = small.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q = Packed(attention.to_q)
    lb.load_adapter(small, tmp_path / "other", "random")
    assert (draw(small) - before).abs().max().item() < 1e-5
    with pytest.raises(
        ValueError, match="the weights of unet are quantised.*fuse before quantising"
    ):
        lb.fuse(small)
    assert (draw(small) - before).abs().max().item() < 1e-5
    assert lb.list_adapters(small)["random"].active
