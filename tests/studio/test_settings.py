import json
import sys
from subprocess import run

import pytest

from lorabook.live.expand import expand
from lorabook.studio.adapters import nearest_settings
from lorabook.studio.settings import AdapterSettings, History, StudioSettings

LAYERS = {
    "unet": [
        "conv_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
        "up_blocks.1.resnets.2.conv1",
        "up_blocks.1.upsamplers.0.conv",
    ],
    "text_encoder": [
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.1.mlp.fc1",
    ],
}


def factors(settings: AdapterSettings) -> dict[str, float]:
    return {
        f"{part}.{module}": value
        for part, found in expand(settings.scales(), LAYERS).items()
        for module, value in found.items()
    }


def test_a_lone_global_scale_is_a_plain_number():
    assert AdapterSettings(scale=0.5).scales() == 0.5


def test_global_block_and_part_multiply():
    found = factors(
        AdapterSettings(
            scale=0.5, blocks={"down.0": 0.4}, parts={"down.0.attentions_1": -1, "resnet": 3}
        )
    )
    assert found[
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ] == pytest.approx(0.2)
    assert found[
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
    ] == pytest.approx(-0.2)
    assert found["unet.down_blocks.0.resnets.0.conv1"] == pytest.approx(0.6)
    assert found["unet.up_blocks.1.resnets.2.conv1"] == pytest.approx(1.5)
    assert (
        found["unet.conv_in"]
        == found["text_encoder.text_model.encoder.layers.1.mlp.fc1"]
        == pytest.approx(0.5)
    )


def test_what_is_outside_and_the_text_encoder_have_their_own():
    found = factors(
        AdapterSettings(
            scale=2,
            blocks={"outside": 0, "text_encoder": 0.25, "mid": 0.5},
            parts={"text_encoder.layer_0": 0, "up.1.sampler": 0},
        )
    )
    assert found["unet.conv_in"] == found["unet.up_blocks.1.upsamplers.0.conv"] == 0
    assert found["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] == 0
    assert found["text_encoder.text_model.encoder.layers.1.mlp.fc1"] == 0.5
    assert found["unet.mid_block.attentions.0.proj_in"] == 1


@pytest.mark.parametrize(
    "said",
    [
        {"scale": 0.3},
        {"scale": 0},
        {"blocks": {"down.0": 0, "text_encoder": 0.5}},
        {"parts": {"resnet": 0, "cross-attention": 0}},
        {"parts": {"down.0.attentions_1": 0.2, "up.1.sampler": 0}},
    ],
)
def test_settings_are_found_again_from_their_numbers(said):
    wanted = expand(AdapterSettings(**said).scales(), LAYERS)
    assert expand(nearest_settings(wanted).scales(), LAYERS) == wanted


def test_a_scale_of_one_is_not_kept():
    settings = (
        StudioSettings()
        .with_adapter("ink", blocks={"up.1": 0.3, "mid": 0.5})
        .with_adapter("ink", blocks={"up.1": 1})
    )
    assert settings.adapters["ink"].blocks == {"mid": 0.5}


def test_changes_leave_the_settings_before_as_they_were():
    before = StudioSettings(adapters={"ink": {"scale": 0.5}})
    after = before.with_(seeds=[1, 2]).with_adapter("ink", rank=4)
    assert before.seeds == (0,) and before.adapters["ink"].rank is None
    assert after.seeds == (1, 2) and after.adapters["ink"] == AdapterSettings(scale=0.5, rank=4)


def test_settings_come_back_from_plain_json():
    settings = StudioSettings(
        "ein Bär",
        seeds=[1, 2],
        width=96,
        blend_method="ties",
        adapters={"ink": AdapterSettings(False, -0.5, {"up.1": 0.2}, {"resnet": 0}, 4)},
    )
    assert StudioSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.in_words() == "base model · seed 1, 2"


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"prompt": 3}, "prompt is a text"),
        ({"seeds": ()}, "seeds are from 1 to 9"),
        ({"seeds": range(10)}, "seeds are from 1 to 9"),
        ({"seeds": (1.5,)}, "seeds are .* whole numbers"),
        ({"seeds": (-1,)}, "seeds are .* whole numbers"),
        ({"seeds": "01"}, "seeds are from 1 to 9"),
        ({"num_inference_steps": 0}, "from 1 to 200"),
        ({"num_inference_steps": True}, "from 1 to 200"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"width": 70}, "multiple of 8"),
        ({"height": 0}, "multiple of 8"),
        ({"scheduler": 3}, "scheduler is a name"),
        ({"compare": 1}, "compare is True or False"),
        ({"adapters": ["ink"]}, "dictionary by name"),
        ({"adapters": {"ink": {"skale": 1}}}, "there is no 'skale'"),
        ({"adapters": {"ink": {"blocks": {"up": 1}}}}, "'up' is not one of the blocks"),
        ({"adapters": {"ink": {"parts": {"attn": 1}}}}, "'attn' is not one of the parts"),
        ({"adapters": {"ink": {"blocks": {"up.1": "x"}}}}, "scale of up.1 must be a finite number"),
        ({"adapters": {"ink": {"rank": 0}}}, "a rank is"),
        ({"adapters": {"ink": {"on": None}}}, "on or off"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(said, says):
    with pytest.raises(ValueError, match=says) as refused:
        StudioSettings.from_dict(said)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_the_settings_need_no_torch():
    code = "import sys, lorabook.studio.settings; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0


def undone(history):
    history.go(-1)
    return history.present


def test_undo_and_redo_go_back_and_forth():
    first = StudioSettings()
    history = History(first)
    assert not history.can_undo and undone(history) == first
    history.push(first.with_(prompt="a"))
    history.push(first.with_(seeds=(1,)))
    assert undone(history).prompt == "a" and undone(history) == first and history.can_redo
    history.go(1)
    assert history.present.prompt == "a"
    history.push(first.with_(prompt="b"))
    assert not history.can_redo and undone(history).prompt == "a"


def moved(*values):
    return [StudioSettings().with_adapter("ink", blocks={"up.1": value}) for value in values]


def test_the_steps_of_one_drag_count_as_one_and_the_same_settings_as_none():
    history = History(moved(1)[0])
    history.push(history.present)
    assert not history.can_undo
    for settings in moved(0.9, 1.0, 0.7, 0.5):
        history.push(settings)
    assert history.present == moved(0.5)[0] and undone(history) == moved(1)[0]


@pytest.mark.parametrize(("block", "pause"), [("mid", 1), ("up.1", 0)])
def test_another_slider_or_a_pause_counts_anew(monkeypatch, block, pause):
    monkeypatch.setattr("lorabook.studio.settings.DRAG_PAUSE", pause)
    history = History(StudioSettings())
    history.push(moved(0.9)[0])
    history.push(moved(0.9)[0].with_adapter("ink", blocks={block: 0}))
    assert undone(history) == moved(0.9)[0]
