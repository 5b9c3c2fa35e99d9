"""Whatever is wrong with what is given: one sentence with the remedy, and a pipeline as before."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorabook as lb
from adapter_files import add_random, plain
from conftest import tiny_sdxl
from lorabook.live.layers import adapter_names
from lorabook.lora.source import read_source

KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"


def draw(pipe):
    return pipe(
        "a red cat",
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture(scope="module")
def shared():
    """One pipeline with an adapter at a scale, for all cases: none of them may change it."""
    pipe = plain(str(lb.bundled("tiny-sd")))
    lb.load_adapter(pipe, "creatures")
    lb.set_scales(pipe, {"creatures": 0.6})
    return pipe


@pytest.fixture
def unchanged(shared):
    picture, table, checksum = draw(shared), str(lb.scales_of(shared)), lb.base_checksum(shared)
    random = torch.get_rng_state()
    yield shared
    assert torch.equal(random, torch.get_rng_state())
    assert adapter_names(shared) == ["creatures"] and str(lb.scales_of(shared)) == table
    assert lb.base_checksum(shared) == checksum and torch.equal(draw(shared), picture)


def refused(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


def ink():
    return load_file(read_source("ink").path)


def write(folder, change=None, name="a.safetensors"):
    weights = ink()
    if change:
        weights = change(weights)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name)
    return folder / name


FILES = {
    "not a LoRA": (lambda w: {"model.weight": torch.ones(2)}, "is not a LoRA: none of its 1 keys"),
    "no key matches": (
        lambda w: {k.replace("unet.", "unet.no."): v for k, v in w.items()},
        "none of its 279 layers is there",
    ),
    "part of the keys matches": (
        lambda w: {k.replace("mid_block", "no_block"): v for k, v in w.items()},
        "only 261 of its 279 layers are there",
    ),
    "half a layer": (
        lambda w: {k: v for k, v in w.items() if k != KEY.format("B")},
        "incomplete: layer .*to_q lacks up",
    ),
    "NaN": (
        lambda w: w | {KEY.format("A"): w[KEY.format("A")] * float("nan")},
        "not finite.*earlier checkpoint",
    ),
    "rank 0": (
        lambda w: (
            w
            | {
                KEY.format(h): w[KEY.format(h)][:0] if h == "A" else w[KEY.format(h)][:, :0]
                for h in "AB"
            }
        ),
        "to_q has rank 0",
    ),
    "halves of different rank": (
        lambda w: w | {KEY.format("A"): w[KEY.format("A")][:3]},
        "3 rows in one half and 8",
    ),
    "another width": (
        lambda w: w | {KEY.format(h): torch.ones(*((8, 7) if h == "A" else (7, 8))) for h in "AB"},
        r"to_q has the shape \(32, 32\) and the adapter \(7, 7\)",
    ),
    "a kind that is not read": (
        lambda w: {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(2, 2, 2)} | w,
        "weights of a kind that is not read here, for example lora_unet_mid",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_with_the_wrong_weights(unchanged, tmp_path, case):
    change, match = FILES[case]
    path = write(tmp_path, change)
    refused(ValueError, match, lambda: lb.load_adapter(unchanged, path, "new"))
    refused(ValueError, r"a\.safetensors", lambda: lb.load_adapter(unchanged, path, "new"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, "truncated"])
def test_a_damaged_file(unchanged, tmp_path, content):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:5000] if content == "truncated" else content)
    refused(
        ValueError,
        r"a\.safetensors cannot be read as safetensors",
        lambda: lb.load_adapter(unchanged, path),
    )


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_a_pickle_is_not_opened_unless_allowed_and_then_as_weights_only(
    unchanged, tmp_path, ending
):
    path, marker = tmp_path / f"old{ending}", tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"weights": Trap()}, path)
    refused(
        ValueError, "is a pickle file.*allow_pickle=True", lambda: lb.load_adapter(unchanged, path)
    )
    refused(ValueError, f"old{ending}", lambda: lb.load_adapter(unchanged, path, allow_pickle=True))
    assert not marker.exists()


def test_an_old_pickle_of_weights_is_read_where_it_is_allowed(pipe, tmp_path):
    torch.save(ink(), tmp_path / "pytorch_lora_weights.bin")
    report = lb.load_adapter(pipe, tmp_path, "old", allow_pickle=True)
    assert report.matched == 558


@pytest.fixture
def large(tmp_path):
    """A tiny SDXL, and a file of an adapter for it."""
    pipe = plain(tiny_sdxl(tmp_path))
    add_random(pipe)
    lb.save_adapter(pipe, tmp_path / "large.safetensors")
    lb.remove_adapter(pipe, "random")
    return pipe


def test_another_architectures_adapter_names_both(large, unchanged, tmp_path):
    refused(
        ValueError,
        "large.safetensors does not fit StableDiffusionPipeline.*made for Stable Diffusion XL.*this is "
        "Stable Diffusion",
        lambda: lb.load_adapter(unchanged, tmp_path / "large.safetensors"),
    )
    refused(
        ValueError,
        "does not fit StableDiffusionXLPipeline.*made for Stable Diffusion .*tiny-sd.*this is Stable "
        "Diffusion XL",
        lambda: lb.load_adapter(large, "ink"),
    )
    assert adapter_names(large) == []


CALLS = {
    "a name that is taken": (
        ValueError,
        "has an adapter 'creatures' already",
        lambda p: lb.load_adapter(p, "ink", "creatures"),
    ),
    "a missing adapter": (
        FileNotFoundError,
        "'nothing' not found",
        lambda p: lb.load_adapter(p, "nothing"),
    ),
    "an unknown component": (
        ValueError,
        "unknown component 'vae'",
        lambda p: lb.load_adapter(p, "ink", components=["vae"]),
    ),
    "a component it lacks": (
        ValueError,
        "has nothing for text_encoder; it has: unet",
        lambda p: lb.load_adapter(p, "ink", components=["text_encoder"]),
    ),
    "a Hub id without network": (
        FileNotFoundError,
        "'someone/else' not found",
        lambda p: lb.load_adapter(p, "someone/else", local_files_only=True),
    ),
    "a weight name that climbs": (
        ValueError,
        "'../ink/x.safetensors' climbs out",
        lambda p: lb.load_adapter(p, "creatures", weight_name="../ink/x.safetensors"),
    ),
    "a subfolder that climbs": (
        ValueError,
        "climbs out",
        lambda p: lb.load_adapter(p, "creatures", subfolder="../ink"),
    ),
    "an absolute weight name": (
        ValueError,
        "climbs out",
        lambda p: lb.load_adapter(p, "creatures", weight_name="/etc/passwd"),
    ),
    "unknown adapter": (
        ValueError,
        "no adapter 'quack'; it has: creatures",
        lambda p: lb.set_scales(p, {"quack": 1}),
    ),
    "unknown block": (
        ValueError,
        "no 'block_7'",
        lambda p: lb.set_scales(p, {"creatures": {"unet": {"up": {"block_7": 1}}}}),
    ),
    "unknown layer": (
        ValueError,
        "no 'conv_inn'",
        lambda p: lb.set_scales(p, {"creatures": {"unet": {"conv_inn": 1}}}),
    ),
    "a scale that is no number": (
        ValueError,
        "finite number",
        lambda p: lb.set_scales(p, {"creatures": None}),
    ),
    "fusing what is not there": (
        ValueError,
        "no adapter 'quack'",
        lambda p: lb.fuse(p, {"quack": 1}),
    ),
    "unfusing nothing": (ValueError, "nothing is fused", lambda p: lb.unfuse(p)),
    "blending one that is not there": (
        ValueError,
        "no adapter 'quack'",
        lambda p: lb.blend(p, {"quack": 1}, new_name="x"),
    ),
    "density outside 0 to 1": (
        ValueError,
        "density must be a number from 0 to 1",
        lambda p: lb.blend(p, {"creatures": 1}, method="ties", new_name="x", density=1.5),
    ),
    "an unknown method": (
        ValueError,
        "unknown method 'mean'",
        lambda p: lb.blend(p, {"creatures": 1}, method="mean", new_name="x"),
    ),
    "a blend's name that is taken": (
        ValueError,
        "give the blend another name",
        lambda p: lb.blend(p, {"creatures": 1}, new_name="creatures"),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be(unchanged, case):
    error, match, call = CALLS[case]
    refused(error, match, lambda: call(unchanged))


def test_adapters_for_different_bases_are_not_blended_unless_told_to(pipe, tmp_path):
    for name in ("one", "two"):
        save_file(ink(), tmp_path / f"{name}.safetensors", {"base_model": f"models/{name}"})
        lb.load_adapter(pipe, tmp_path / f"{name}.safetensors")
    refused(
        ValueError,
        "'one' was made for models/one and 'two' for models/two",
        lambda: lb.blend(pipe, {"one": 0.5, "two": 0.5}, new_name="x"),
    )
    assert (
        lb.blend(pipe, {"one": 0.5, "two": 0.5}, new_name="x", across_bases=True).error["total"]
        < 1e-6
    )
