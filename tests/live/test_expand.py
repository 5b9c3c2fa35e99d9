import pytest
from diffusers import UNetMotionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

import lorabook as lb
from adapter_files import ATTENTION, add_random
from lorabook.blocks import KINDS, block_of, kind_of
from lorabook.live.expand import expand, steps_of
from lorabook.live.layers import lora_layers, models_of, walk


@pytest.fixture(scope="module")
def modules():
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    return {part: [name for name, _ in walk(model)] for part, model in models_of(pipe).items()}


def where(factors, value):
    return {name for name, factor in factors["unet"].items() if factor == value}


def test_a_number_is_for_all_layers(modules):
    assert set(expand(0.5, modules)["unet"].values()) | set(
        expand(0.5, modules)["text_encoder"].values()
    ) == {0.5}


def test_what_is_not_named_is_one(modules):
    factors = expand({"unet": {"down": 0.5}}, modules)
    assert where(factors, 0.5) == {m for m in modules["unet"] if block_of(m).startswith("down")}
    assert set(factors["text_encoder"].values()) == {1.0}
    assert where(factors, 1.0) | where(factors, 0.5) == set(modules["unet"])


def test_resnets_and_samplers_and_blocks_without_attention_obey(modules):
    factors = expand({"unet": {"down": 0, "mid": 0, "up": 0}}, modules)
    assert {block_of(m) for m in where(factors, 1.0)} == {"outside"}
    assert {
        block_of(m) for m in where(expand({"unet": {"up": {"block_0": 0.3}}}, modules), 0.3)
    } == {"up.0"}


def test_a_lists_entries_scale_attentions_and_resnets_and_samplers_take_the_last(modules):
    found = expand({"unet": {"up": {"block_1": [0.4, 0.8, 0.9]}}}, modules)["unet"]
    assert found["up_blocks.1.attentions.1.proj_in"] == found["up_blocks.1.resnets.1.conv1"] == 0.8
    assert found["up_blocks.1.upsamplers.0.conv"] == found["up_blocks.1.resnets.2.conv2"] == 0.9


def test_the_middle_block_takes_a_list_of_one_or_two(modules):
    one, two = (expand({"unet": {"mid": said}}, modules)["unet"] for said in ([0.3], [0.3, 0.6]))
    assert one["mid_block.resnets.1.conv1"] == 0.3 and two["mid_block.resnets.1.conv1"] == 0.6
    assert one["mid_block.attentions.0.proj_in"] == two["mid_block.attentions.0.proj_in"] == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_reaches_its_layers_and_no_others(modules, kind):
    assert (
        where(expand({"unet": {kind: 0.2}}, modules), 0.2)
        == {m for m in modules["unet"] if kind_of(m) == kind}
        != set()
    )


def test_a_glob_and_a_full_name_reach_their_layers(modules):
    assert where(expand({"unet": {"*.attn2.to_k": 0.2}}, modules), 0.2) == {
        m for m in modules["unet"] if "attn2.to_k" in m
    }
    assert where(expand({"unet": {"conv_in": 0.2}}, modules), 0.2) == {"conv_in"}


def test_parts_of_a_block_have_names(modules):
    found = where(
        expand(
            {"unet": {"down": {"block_1": {"attentions_0": 0.2, "cross-attention": 0.5}}}}, modules
        ),
        0.1,
    )
    assert found and all("down_blocks.1.attentions.0" in m and ".attn2." in m for m in found)


def test_all_that_is_said_of_a_layer_multiplies(modules):
    found = expand({"unet": {"up": 0.5, "cross-attention": 0.5, "*.to_k": 0.5}}, modules)["unet"]
    assert found["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"] == 0.125


def test_text_encoders_have_layers_and_kinds(modules):
    found = expand({"text_encoder": {"layer_0": 0.5, "feed-forward": 0}}, modules)["text_encoder"]
    assert found[next(m for m in found if "layers.0.self_attn.q_proj" in m)] == 0.5
    assert found[next(m for m in found if "layers.1.mlp" in m)] == 0


@pytest.mark.parametrize(
    "scales, told",
    [
        ({"unett": 1}, "'unett' is no component of this pipeline; it has: unet, text_encoder"),
        ({"unet": {"donw": 1}}, "no 'donw'; it has: down, mid, up; the kinds are attention"),
        (
            {"unet": {"up": {"block_9": 1}}},
            "no 'block_9'; it has: block_0, block_1, block_2, block_3",
        ),
        (
            {"unet": {"up": {"block_1": [1, 2]}}},
            "list of 2 scales does not fit; the block has 3 attentions and 3 resnets",
        ),
        (
            {"unet": {"up": {"block_1": {"attentions_7": 1}}}},
            "no 'attentions_7'; it has: attentions_0",
        ),
        ({"unet": {"*.nothing": 1}}, r"no '\*.nothing'"),
        ({"text_encoder": {"layer_99": 1}}, "no 'layer_99'; it has: layer_0"),
        ({"unet": {"down": "much"}}, "scale of it.unet.down must be a finite number, not 'much'"),
        ({"unet": {"mid": float("nan")}}, "finite number"),
        ({"unet": None}, "finite number"),
        (True, "finite number"),
    ],
)
def test_what_is_unknown_or_no_number_lists_what_there_is(modules, scales, told):
    with pytest.raises(ValueError, match=told) as caught:
        expand(scales, modules, "it")
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    "steps, told",
    [
        ([[0, 0.5]], r"not \[from, to, factor\]"),
        ([[0.5, 0.2, 1]], "no share of the run"),
        ([[0, 1.2, 1]], "no share"),
        ([[0, 0.5, 1], [0.4, 1, 2]], "overlap at 0.4"),
        ([[0, 1, "x"]], "finite number"),
    ],
)
def test_a_schedule_that_is_none_is_an_error(steps, told):
    with pytest.raises(ValueError, match=told):
        steps_of({"steps": steps}, "it")


LISTS = [
    {"down": [0.4, 0.8]},
    {"down": [0.3]},
    {"up": [0.1, 0.5, 0.9]},
    {"mid": [0.5], "up": [0.2]},
    {"down": {"block_1": [0.6]}, "up": {"block_1": [0.4, 0.8, 1.0]}},
]


@pytest.mark.parametrize("scales", LISTS)
def test_lists_scale_attention_as_in_diffusers(pipe, scales):
    add_random(pipe, ATTENTION, text=False)
    pipe.set_adapters(["random"], [{"unet": scales}])
    theirs = {name: layer.scaling["random"] for name, layer in lora_layers(pipe)["unet"].items()}
    lb.set_scales(pipe, {"random": {"unet": scales}})
    assert {
        name: layer.scaling["random"] for name, layer in lora_layers(pipe)["unet"].items()
    } == pytest.approx(theirs)


def test_a_list_for_a_side_that_does_not_fit_names_the_block(modules):
    with pytest.raises(ValueError, match=r"it.unet.up.block_0: a list of 2 scales does not fit"):
        expand({"unet": {"up": [0.5, 1]}}, modules, "it")


@pytest.fixture(scope="module")
def motion():
    """A small random UNet of AnimateDiff, whose blocks have motion modules."""
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        cross_attention_dim=8,
        num_attention_heads=2,
        norm_num_groups=4,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )


@pytest.mark.parametrize(
    "scales", [*LISTS[:4], {"down": 0.3, "mid": 0.4, "up": {"block_1": [0.5, 0.6, 0.7]}}]
)
def test_motion_modules_are_scaled_as_in_diffusers(motion, scales):
    names = [
        name for name, _ in walk(motion) if ".attentions." in name or ".motion_modules." in name
    ]
    blocks = _maybe_expand_lora_scales(motion, [{key: value for key, value in scales.items()}])[0]
    found = expand({"unet": scales}, {"unet": [name for name, _ in walk(motion)]})["unet"]
    places = {
        name: ".".join([*name.split(".")[:2], "attentions", name.split(".")[3]])
        for name in names
        if not name.startswith("mid_block")
    }
    theirs = {name: blocks[place] for name, place in places.items() if place in blocks}
    assert len(theirs) > 50 and {name: found[name] for name in theirs} == theirs


def test_motion_modules_are_parts_of_their_block(motion):
    names = [name for name, _ in walk(motion)]
    found = where(
        expand({"unet": {"down": {"block_0": {"motion_modules_1": 0.2}}}}, {"unet": names}), 0.2
    )
    assert (
        found
        == {name for name in names if name.startswith("down_blocks.0.motion_modules.1.")}
        != set()
    )


@pytest.mark.parametrize(
    "names, scales, told",
    [
        (
            ["down_blocks.0.resnets.0.conv1", "conv_in"],
            {"mid": 0.5},
            "it.unet.mid: the model has no 'mid' blocks",
        ),
        (
            ["down_blocks.0.resnets.0.conv1", "conv_in"],
            {"mid": [0.5]},
            "it.unet.mid: the model has no 'mid' blocks",
        ),
        (
            ["transformer_blocks.0.attn.to_q"],
            {"down": 0.5},
            "it.unet.down: the model has no 'down' blocks",
        ),
    ],
)
def test_a_side_that_the_model_lacks_is_an_error(names, scales, told):
    with pytest.raises(ValueError, match=told):
        expand({"unet": scales}, {"unet": names}, "it")


def test_names_that_only_look_like_a_blocks_stay_at_their_components_number():
    names = [
        "controlnet_down_blocks.0",
        "controlnet_mid_block",
        "controlnet_cond_embedding.conv_in",
        "down_blocks.0.skip_conv",
        "down_blocks.0.ctrl_resnets.0.conv1",
        "mid_block.temp_attentions.0.proj_in",
    ]
    assert set(expand({"unet": 0.5}, {"unet": names})["unet"].values()) == {0.5}
    found = expand({"unet": {"down": {"block_0": 0.2}, "mid": 0.3}}, {"unet": names})["unet"]
    assert list(found.values()) == [1.0, 1.0, 1.0, 0.2, 0.2, 0.3]
