import random

import pytest

import lorabook as lb
from adapter_files import modules_of
from conftest import tiny_sdxl
from lorabook.blocks import block_of, kind_of
from lorabook.live.expand import expand
from lorabook.live.presets import (
    NAMES,
    PRESETS,
    VECTORS,
    from_block_weights,
    preset,
    to_block_weights,
)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """The layers of both families."""
    sdxl = tiny_sdxl(tmp_path_factory.mktemp("models"))
    return {
        "sd": modules_of(lb.load_pipeline("tiny-sd", device="cpu")),
        "sdxl": modules_of(lb.load_pipeline(sdxl, device="cpu")),
    }


def acting(layers, name, family="sd"):
    """The layers of the UNet that a preset leaves at 1; the rest are at 0."""
    factors = expand(preset(name, family), layers[family])["unet"]
    assert set(factors.values()) <= {0.0, 1.0}
    return {module for module, factor in factors.items() if factor}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("name", [*PRESETS, *VECTORS])
def test_every_preset_fits_every_family_and_says_why(layers, name, family):
    factors = expand(preset(name, family), layers[family])
    numbers = {number for part in factors.values() for number in part.values()}
    assert numbers - {1.0} and (name in VECTORS or PRESETS[name].why)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cross-attention only", "cross-attention"),
        ("self-attention only", "attention"),
        ("feed-forward only", "feed-forward"),
        ("resnets only", "resnet"),
    ],
)
def test_one_kind_only_is_that_kind(layers, name, kind):
    assert acting(layers, name) == {
        module for module in layers["sd"]["unet"] if kind_of(module) == kind
    }
    assert preset(name)["text_encoder"] == 0


def test_sdxls_style_layout_and_content_are_one_attention_each(layers):
    for name, home in (
        ("style blocks", "up_blocks.0.attentions.1."),
        ("layout blocks", "down_blocks.2.attentions.1."),
        ("content blocks", "up_blocks.0.attentions.0."),
    ):
        assert acting(layers, name, "sdxl") == {
            m for m in layers["sdxl"]["unet"] if m.startswith(home)
        }


def test_sds_style_and_layout_share_no_block(layers):
    style, layout = (
        {block_of(m) for m in acting(layers, name)} for name in ("style blocks", "layout blocks")
    )
    assert style == {"up.2", "up.3"} and layout == {"down.2", "down.3", "mid", "up.0", "up.1"}


def test_unet_and_text_encoder_only_are_each_other(layers):
    unet, text = (
        expand(preset(f"{part} only", "sdxl"), layers["sdxl"]) for part in ("unet", "text encoder")
    )
    assert all(unet[part][m] + text[part][m] == 1 for part in unet for m in unet[part])


def test_the_extensions_presets_have_its_numbers(layers):
    middle, half = (expand(preset(name), layers["sd"]) for name in ("MIDD", "ALL0.5"))
    assert to_block_weights(middle, 17) == [1, 0, 0, 0, *[1] * 8, 0, 0, 0, 0, 0]
    assert to_block_weights(half, 17) == [0.5] * 17
    assert {len(numbers) for numbers in VECTORS.values()} == {17}


def test_on_sdxl_the_extensions_presets_switch_off_what_they_do_not_name(layers):
    numbers = to_block_weights(expand(preset("ALL", "sdxl"), layers["sdxl"]), 20)
    off = [name for name, number in zip(NAMES[20], numbers, strict=True) if not number]
    assert off == ["IN00", "IN03", "IN06", "OUT00", "OUT01", "OUT02"]


def test_a_preset_that_is_changed_stays_what_it_was():
    preset("no resnets")["unet"]["resnet"] = 5
    assert preset("no resnets")["unet"] == {"resnet": 0}


def test_set_scales_takes_a_presets_name(pipe):
    lb.load_adapter(pipe, "creatures")
    found = lb.set_scales(pipe, {"creatures": "cross-attention only"})["creatures"]["unet"]
    assert {module for module, number in found.items() if number} == {
        module for module in found if "attn2" in module
    }


@pytest.mark.parametrize(
    "name, family, message",
    [
        ("style block", "sd", "unknown preset 'style block'; the nearest are: style blocks"),
        ("OUTSS", "sd", "the nearest are: OUTS"),
        ("x", "sd", "the presets are: unet only, .*ALL0.5"),
        ("ALL", "flux", "unknown family 'flux'; the families are: sd, sdxl"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name, family, message):
    with pytest.raises(ValueError, match=message):
        preset(name, family)


# vectors of block weights

# what the extension calls the layers of each of its blocks, as Stability's own code names them
THEIRS = {
    f"{short}{i:02}": f"{long}_blocks.{i}."
    for short, long in (("IN", "input"), ("OUT", "output"))
    for i in range(12)
} | {"MID": "middle_block."}


def stability_names(modules, layers_per_block=2):
    """The UNet's layers by Stability's names, from the order in which a UNet is run."""
    found, into, out = {"input_blocks.0.": ["conv_in"]}, 1, 0
    for side, most in (("down", layers_per_block), ("up", layers_per_block + 1)):
        for block in range(sum(f"{side}_blocks.{b}.resnets.0.conv1" in modules for b in range(9))):
            samplers = [m for m in modules if m.startswith(f"{side}_blocks.{block}.{side}samplers")]
            for i in range(most):
                inside = [
                    m
                    for m in modules
                    for part in ("resnets", "attentions")
                    if m.startswith(f"{side}_blocks.{block}.{part}.{i}.")
                ]
                if side == "up":
                    found[f"output_blocks.{out}."], out = (
                        inside + samplers * (i == most - 1),
                        out + 1,
                    )
                else:
                    found[f"input_blocks.{into}."], into = inside, into + 1
            if side == "down" and samplers:
                found[f"input_blocks.{into}."], into = samplers, into + 1
    return found | {"middle_block.": [m for m in modules if m.startswith("mid_block.")]}


@pytest.mark.parametrize(
    "count, family", [(17, "sd"), (26, "sd"), (12, "sdxl"), (20, "sdxl"), (26, "sdxl"), (20, "sd")]
)
def test_every_layer_gets_the_number_of_its_block(layers, count, family):
    numbers = [n / 7 for n in range(1, count + 1)]
    factors = expand(from_block_weights(numbers, family=family), layers[family])
    said = dict(zip(NAMES[count], numbers, strict=True))
    theirs = stability_names(layers[family]["unet"])
    for name, prefix in THEIRS.items():
        for module in theirs.get(prefix, []):
            assert factors["unet"].pop(module) == said.get(name, 0), f"{name}: {module}"
    assert set(factors.pop("unet").values()) == {1.0}  # conv_out and the embeddings of time
    assert {number for part in factors.values() for number in part.values()} == {said["BASE"]}


@pytest.mark.parametrize("count, family", [(17, "sd"), (26, "sd"), (12, "sdxl"), (20, "sdxl")])
def test_there_and_back_is_the_same_vector(layers, count, family):
    numbers = [round(random.Random(count).uniform(-1, 1), 3) for _ in range(count)]
    scales = from_block_weights(numbers)
    assert to_block_weights(expand(scales, layers[family]), count) == numbers


def test_set_scales_takes_a_vector_and_gives_it_back(pipe):
    lb.load_adapter(pipe, "creatures")
    numbers = [1.0] + [n / 16 for n in range(16)]
    table = lb.set_scales(pipe, {"creatures": numbers})
    assert to_block_weights(table["creatures"], 17) == numbers


def test_an_adapter_without_layers_in_a_block_gives_one_there():
    assert (
        to_block_weights({"unet": {"mid_block.attentions.0.proj_in": 0.3}}, 12)
        == [1] * 5 + [0.3] + [1] * 6
    )


@pytest.mark.parametrize(
    "scales, count, message",
    [
        (
            {"unet": {"mid_block.attentions.0.proj_in": 1, "mid_block.resnets.1.conv1": 0}},
            17,
            "in MID, as its first layer, 1 of 17, where unet.mid_block.resnets.1.conv1 is at 0",
        ),
        ({"text_encoder": {"a.b": 1}, "text_encoder_2": {"a.b": 0.5}}, 12, "in BASE"),
        (
            {"unet": {"conv_out": 0.5}},
            26,
            "outside the blocks, 1 of 26, where unet.conv_out is at 0.5",
        ),
        (
            {"unet": {"down_blocks.0.downsamplers.0.conv": 1.0}},
            17,
            "in IN03, 0 of 17, where .* is at 1; try 26",
        ),
        ({"unet": {"up_blocks.2.resnets.0.conv1": 1.0}}, 12, "in OUT06, 0 of 12"),
        ({}, 16, "12, 17, 20 or 26 numbers, not 16"),
    ],
)
def test_what_a_vector_cannot_say_is_named(scales, count, message):
    with pytest.raises(ValueError, match=message):
        to_block_weights(scales, count)


@pytest.mark.parametrize(
    "numbers, family, message",
    [
        ([1] * 16, None, "12, 17, 20 or 26 numbers, not 16"),
        ([1] * 16 + [float("nan")], None, "block weight OUT11 must be a finite number, not nan"),
        ([1, "R"] + [1] * 10, None, "block weight IN04 must be a finite number, not 'R'"),
        ([True] * 12, None, "block weight BASE"),
        ([1] * 12, "flux", "unknown family 'flux'; the families are: sd, sdxl"),
    ],
)
def test_what_is_no_vector_is_refused(numbers, family, message):
    with pytest.raises(ValueError, match=message):
        from_block_weights(numbers, family=family)
