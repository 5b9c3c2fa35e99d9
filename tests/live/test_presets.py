import pytest

import lorabook as lb
from adapter_files import modules_of
from conftest import tiny_sdxl
from lorabook.blocks import block_of, kind_of
from lorabook.live.expand import expand
from lorabook.live.presets import NAMES, PRESETS, VECTORS, preset, to_block_weights


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
