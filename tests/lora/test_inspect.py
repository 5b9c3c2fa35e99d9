import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lorabook.lora.adapter import Adapter, Layer, lora
from lorabook.lora.formats.read import parse
from lorabook.lora.inspect import inspect_adapter

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
CONV = "up_blocks.1.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def adapter(**changes) -> Adapter:
    return Adapter(
        {
            "text_encoder": {TEXT: lora(rand(16, 3), rand(3, 16))},
            "unet": {
                CROSS: lora(rand(24, 4), rand(4, 20), 0.5),
                CONV: lora(rand(12, 8, 1, 1), rand(8, 5, 3, 3)),
                ATTENTION: lora(rand(24, 8), rand(8, 20), 0.5),
            },
        },
        **changes,
    )


@pytest.fixture(scope="module")
def bundled():
    return inspect_adapter("patch_cat")


def test_a_bundled_adapter_is_described(bundled):
    assert (bundled.format, bundled.base_model) == ("diffusers", "tiny-sd")
    assert bundled.ranks == {8: 295}
    assert bundled.numbers == 805_888 and bundled.size == bundled.path.stat().st_size
    assert re.search(r"alpha +8\n", str(bundled)) and re.search(r"rank +1\n", str(bundled))
    assert (
        bundled.trigger_words == ("a drawing of sks cat",)
        and bundled.training["learning_rate"] == "0.002"
    )


def test_a_sound_adapter_has_no_suspicious_layers(bundled):
    assert bundled.suspicious == {}


def test_norms_are_those_of_the_dense_deltas():
    found, layers = inspect_adapter(adapter()), adapter().layers
    assert found.norms["down.0"] == pytest.approx(
        float(layers["unet"][ATTENTION].delta().norm()), rel=1e-5
    )
    both = torch.stack([layers["unet"][module].delta().norm() for module in (CROSS, CONV)])
    assert found.norms["up.1"] == pytest.approx(float(both.norm()), rel=1e-5)


def test_the_parts_sum_to_the_whole(bundled):
    for found in (bundled, inspect_adapter(adapter())):
        whole = found.norm**2
        assert sum(norm**2 for norm in found.places.values()) == pytest.approx(whole)
        assert sum(norm**2 for norm in found.norms.values()) == pytest.approx(whole)
        assert sum(found.shares.values()) == pytest.approx(1)


def test_blocks_stand_in_the_order_of_the_unet():
    assert [*inspect_adapter(adapter()).blocks] == ["down.0", "up.1", "text_encoder"]


def test_spectra_start_at_one_and_fall(bundled):
    assert bundled.spectra.keys() == bundled.blocks.keys()
    for values in bundled.spectra.values():
        assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)


def test_the_heat_map_shows_every_part_of_every_block(bundled):
    axes = bundled.plot().figure.axes[0]
    names = [text.get_text() for text in axes.texts]
    assert len(axes.patches) == len(bundled.places) == 45
    assert (
        names.count("attn 0") == 7 and names.count("sampler") == 6
    )  # three down, mid, three up; three each way
    assert f"down.0\n{bundled.shares['down.0']:.1%}" in names and any(
        name.startswith("text encoder") for name in names
    )


def test_it_shows_itself_with_picture_and_tables(bundled):
    assert Image.open(io.BytesIO(bundled._repr_png_())).width > 800
    page = bundled._repr_html_()
    assert "data:image/png;base64" in page and 'alt="‖ΔW‖' in page and page.count("<table>") == 3


def test_in_words_it_has_a_line_for_each_block(bundled):
    lines = str(bundled).splitlines()
    assert any(
        line.startswith("up.1") and f"{bundled.shares['up.1']:.1%}" in line for line in lines
    )
    assert any(line.startswith("file") and bundled.sha256[:10] in line for line in lines)


def test_weights_in_memory_have_neither_file_nor_hash():
    found = inspect_adapter(adapter())
    assert found.path is found.size is found.sha256 is None and "weights in memory" in str(found)


def test_a_doras_limits_are_told():
    dora = adapter()
    dora.layers["unet"][ATTENTION] = replace(
        dora.layers["unet"][ATTENTION], magnitude=torch.ones(24)
    )
    assert "all numbers are of its LoRA part" in str(inspect_adapter(dora))


def test_what_was_assumed_and_ignored_is_told():
    halves = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": rand(2, 8),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": rand(8, 2),
    }
    text = str(inspect_adapter(parse(halves | {"junk.key": rand(1, 1)})))
    assert "alpha of 1 layers, taken as their rank" in text
    assert "1 keys name no layer, for example junk.key" in text


def test_suspicious_layers_are_listed_by_reason():
    broken = adapter()
    broken.layers["unet"] |= {
        f"mid_block.attentions.0.{i}.to_q": lora(torch.zeros(8, 2), rand(2, 8)) for i in range(4)
    }
    assert len(inspect_adapter(broken).suspicious) == 4
    assert "mid_block.attentions.0.0.to_q and 3 more  ΔW is all zeros" in str(
        inspect_adapter(broken)
    )


def test_an_adapter_with_nan_is_still_shown():
    broken = adapter()
    broken.layers["unet"][CONV].tensors["up"].fill_(float("nan"))
    found = inspect_adapter(broken)
    assert "not finite" in found.suspicious[f"unet.{CONV}"] and sum(
        found.shares.values()
    ) == pytest.approx(1)
    assert found._repr_png_()


def test_an_untrained_adapter_has_no_shares_and_no_spectra():
    found = inspect_adapter(Adapter({"unet": {ATTENTION: lora(torch.zeros(24, 4), rand(4, 20))}}))
    assert found.shares == {"down.0": 0.0} and found.spectra == {} and found._repr_png_()


def test_the_folders_of_the_machine_are_not_shown():
    told = {
        "training": json.dumps(
            {"pretrained_model_name_or_path": "/home/me/sd", "hub_token": "hf_x"}
        )
    }
    text = str(inspect_adapter(adapter(metadata=told, base_model="/home/me/sd")))
    assert "/home/me" not in text and "hf_x" not in text and "sd" in text


def test_what_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError, match="no-such"):
        inspect_adapter("no-such-adapter")


def test_a_training_run_can_be_inspected(bundled):
    assert inspect_adapter(SimpleNamespace(adapter=bundled.path)).norm == bundled.norm


BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0.attn1."


def rows(**layers: Layer):
    layers = {BLOCK + module: layer for module, layer in layers.items()}
    return inspect_adapter(Adapter({"unet": layers})).layers


def doubt(layer: Layer) -> str:
    sound = {f"to_{i}": lora(rand(24, 8), rand(8, 20)) for i in range(5)}
    layers = {BLOCK + module: layer for module, layer in (sound | {"odd": layer}).items()}
    return inspect_adapter(Adapter({"unet": layers})).suspicious.get(f"unet.{BLOCK}odd", "")


@pytest.mark.parametrize(
    "layer",
    [
        lora(rand(24, 4), rand(4, 20), 0.5),
        lora(rand(24, 30), rand(30, 20)),
        lora(rand(12, 4, 1, 1), rand(4, 5, 3, 3), -2.0),
        Layer(
            "loha",
            {"w1_a": rand(24, 2), "w1_b": rand(2, 20), "w2_a": rand(24, 2), "w2_b": rand(2, 20)},
            0.5,
            2,
        ),
        Layer("lokr", {"w1": rand(4, 5), "w2": rand(6, 4, 3, 3)}, -0.5, 1),
        Layer("lokr", {"w1": rand(4, 5), "w2_a": rand(6, 2), "w2_b": rand(2, 4)}, 0.5, 2),
        Layer("full", {"diff": rand(24, 20)}),
    ],
)
def test_spectra_are_the_singular_values_of_the_dense_delta(layer):
    (row,) = rows(x=layer)
    values = torch.linalg.svdvals(layer.delta().double()).float()
    assert torch.allclose(row.spectrum, values[: len(row.spectrum)], atol=1e-5 * float(values[0]))
    assert row.norm == pytest.approx(float(layer.delta().norm()), rel=1e-5)


def test_effective_rank_counts_directions_that_are_used():
    up, down = torch.eye(24, 8), torch.eye(8, 20)
    assert rows(x=lora(up, down))[0].effective_rank == pytest.approx(8)
    down[2:] = 0
    assert rows(x=lora(up, down))[0].effective_rank == pytest.approx(2)


def test_a_doras_magnitude_is_counted_but_not_measured():
    plain = lora(rand(24, 2), rand(2, 20))
    (row,) = rows(x=replace(plain, magnitude=rand(24)))
    assert row.numbers == 24 * 2 + 2 * 20 + 24 and row.norm == pytest.approx(
        float(plain.delta().norm()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("component", "module", "block", "place"),
    [
        ("unet", BLOCK + "to_q", "down.0", "down.0.attentions_1"),
        ("unet", "mid_block.resnets.1.conv1", "mid", "mid.resnets_1"),
        ("unet", "up_blocks.2.upsamplers.0.conv", "up.2", "up.2.sampler"),
        ("unet", "conv_in", "outside", "outside"),
        (
            "text_encoder",
            "text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder",
            "text_encoder",
        ),
    ],
)
def test_a_layer_knows_where_it_is(component, module, block, place):
    (row,) = inspect_adapter(Adapter({component: {module: lora(rand(4, 1), rand(1, 4))}})).layers
    assert (row.block, row.place) == (block, place)


def test_a_sound_layer_is_not_suspicious():
    assert doubt(lora(rand(24, 8), rand(8, 20), 2.0)) == ""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lora(torch.full((24, 8), float("nan")), rand(8, 20)), "not finite"),
        (lora(torch.full((24, 8), float("inf")), rand(8, 20)), "not finite"),
        (lora(torch.zeros(24, 8), rand(8, 20)), "all zeros"),
        (lora(rand(24, 8) * 20, rand(8, 20)), "20 times the median of unet's attention layers"),
        (lora(rand(24, 8), rand(8, 20), 128.0), "alpha / rank is 128"),
        (lora(rand(24, 8), rand(8, 20), 0.0), "alpha / rank is 0;"),
        (
            lora(torch.cat([rand(24, 1), rand(24, 15) * 1e-3], 1), rand(16, 20)),
            r"effective rank is 1\.\d, far below its rank of 16",
        ),
    ],
)
def test_what_is_wrong_with_a_layer_is_named(layer, reason):
    assert re.search(reason, doubt(layer))


def test_layers_that_are_not_finite_are_left_out_of_sums():
    sound = lora(rand(24, 8), rand(8, 20))
    broken = lora(torch.full((24, 8), float("nan")), rand(8, 20))
    both, alone = (
        inspect_adapter(
            Adapter({"unet": {BLOCK + module: layer for module, layer in layers.items()}})
        )
        for layers in ({"a": sound, "b": broken}, {"a": sound})
    )
    assert both.norm == alone.norm
