import pytest
import torch
from safetensors.torch import save_file

import lorabook as lb
from lorabook.live.presets import from_block_weights, preset
from lorabook.live.prompt_syntax import Mention, find_adapters, merged, parse_prompt
from lorabook.lora.formats.keys import WEIGHT_NAME


def only(prompt):
    """The one adapter of a prompt, without how it was written; with the steps where it says some."""
    (mention,) = parse_prompt(prompt)[1]
    steps = (mention.start, mention.stop)
    return (
        mention.name,
        mention.text_encoder,
        mention.unet,
        mention.blocks,
        *(steps if steps != (None, None) else ()),
    )


@pytest.mark.parametrize(
    "phrase, meant",
    [
        ("<lora:ink>", ("ink", 1, 1, None)),
        ("<lora:ink:0.8>", ("ink", 0.8, 0.8, None)),
        ("<lora:ink:-1.5>", ("ink", -1.5, -1.5, None)),
        ("<lyco:ink:.5>", ("ink", 0.5, 0.5, None)),
        ("< lora : old ink : 0.8 >", ("old ink", 0.8, 0.8, None)),
        ("<lora:ink:0.5:1>", ("ink", 0.5, 1, None)),
        ("<lora:ink:te=0.5>", ("ink", 0.5, 0.5, None)),
        ("<lora:ink:unet=0.5>", ("ink", 1, 0.5, None)),
        ("<lora:ink:1:te=0:unet=0.7>", ("ink", 0, 0.7, None)),
        ("<lora:ink:1:lbw=OUTS>", ("ink", 1, 1, "OUTS")),
        ("<lora:ink:1:0.5:lbw=style blocks>", ("ink", 1, 0.5, "style blocks")),
        ("<lora:ink:1:INS>", ("ink", 1, 1, "INS")),
        ("<lora:ink:0.7:lbw=" + ",".join(["1", " 0.5"] * 6) + ">", ("ink", 0.7, 0.7, (1, 0.5) * 6)),
        ("<lora:ink:1:" + ",".join("0" * 26) + ">", ("ink", 1, 1, (0,) * 26)),
        ("<lora:ink_v1.0:1>", ("ink_v1.0", 1, 1, None)),
        ("<lora:ink:1:w=OUTALL>", ("ink", 1, 1, "OUTALL")),
        ("<lora:ink:1:1:w=" + ",".join("0" * 17) + ">", ("ink", 1, 1, (0,) * 17)),
        ("<lora:ink:1:lbw=ALL:stop=10>", ("ink", 1, 1, "ALL", None, 10)),
        ("<lora:ink:lbw=ALL:start=10>", ("ink", 1, 1, "ALL", 10, None)),
        ("<lora:ink:0.5:step=5-10>", ("ink", 0.5, 0.5, None, 5, 10)),
        ("<lora:ink:1:start= 2 :stop = 0.4>", ("ink", 1, 1, None, 2, 0.4)),
    ],
)
def test_a_phrase_means_what_it_means_in_a1111(phrase, meant):
    assert only(f"a cat {phrase}") == meant


def test_only_the_phrase_is_taken_out():
    text, mentions = parse_prompt("a red cat, <lora:ink:0.5>, <lora:mosaic:1> on sand")
    assert text == "a red cat, ,  on sand" and [m.name for m in mentions] == ["ink", "mosaic"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a (red:1.2) cat [blurry]",
        "a <sks> cat",
        "<cat-toy>",
        "<lora-cat>",
        "1 < 2, 3 > 2",
        "I <3 cats",
        "a <b: c",
    ],
)
def test_a_prompt_without_phrases_stays_as_it_is(text):
    assert parse_prompt(text) == (text, [])


@pytest.mark.parametrize(
    "phrase, reason",
    [
        ("<lora:ink:much>", "'much' is no finite number"),
        ("<lora:ink:>", "'' is no finite number"),
        ("<lora:ink:nan>", "'nan' is no finite number"),
        ("<lora:ink:1:lbw=1,0>", "12, 17, 20 or 26 numbers, not 2"),
        ("<lora:ink:1:lbw=1,R" + ",0" * 15 + ">", "'R' is no finite number"),
        ("<lora:ink:1:lbw=OUTSS>", "unknown preset 'OUTSS'; the nearest are: OUTS"),
        (
            "<lora:ink:1:begin=5>",
            "begin= is given twice or not known; known are: te=, unet=, lbw=, w=, start=, stop=, step=",
        ),
        ("<lora:ink:1:lbw=INS:w=OUTS>", "lbw= and w= are the same"),
        ("<lora:ink:1:lbwe=ATTN>", "lbwe= (weights of single layers) is not supported"),
        ("<lora:ink:1:lbw=ALL:x=0.5>", "x= (a weight for the X in block weights) is not supported"),
        ("<lora:ink:1:dyn=8>", "dyn= (another rank) is not supported"),
        ("<lora:ink:1:step=5>", "step= is two steps, as step=5-10"),
        ("<lora:ink:1:step=5-10:stop=8>", "in place of start= and stop="),
        ("<lora:ink:1:stop=-3>", "-3 is no step"),
        ("<lora:ink:1:start=2.5>", "2.5 is no step"),
        ("<lora:ink:1:stop=soon>", "'soon' is no finite number"),
        ("<lora:ink:te=1:te=2>", "te= is given twice"),
        ("<lora:ink:1:1:64>", "more than two weights"),
        ("<lora::1>", "names no adapter"),
        ("<lora:ink:1", "should read <lora:name:weight>"),
        ("<lora ink:1>", "should read <lora:name:weight>"),
        ("<lroa:ink:1>", "begins with one of: lora, lyco"),
        ("<hypernet:ink:1>", "begins with one of: lora, lyco"),
    ],
)
def test_what_cannot_be_parsed_is_named(phrase, reason):
    with pytest.raises(ValueError) as error:
        parse_prompt(f"a cat {phrase}")
    assert (
        phrase[:100] in str(error.value)
        and reason in str(error.value)
        and len(str(error.value)) <= 400
    )


def test_weights_of_an_adapter_named_twice_add_up():
    mentions = parse_prompt("<lora:ink:0.5><lora:mosaic:1><lora:ink:0.25:-0.5>")[1]
    assert {name: (m.text_encoder, m.unet) for name, m in merged(mentions).items()} == {
        "ink": (0.75, 0),
        "mosaic": (1, 1),
    }


def test_an_adapter_named_twice_with_other_block_weights_is_refused():
    with pytest.raises(
        ValueError, match="'<lora:ink:1:lbw=INS>'.*'ink' is named before with other block weights"
    ):
        merged(parse_prompt("<lora:ink:1><lora:ink:1:lbw=INS>")[1])
    with pytest.raises(ValueError, match="or other steps"):
        merged(parse_prompt("<lora:ink:1><lora:ink:1:stop=3>")[1])


def test_steps_are_shares_of_the_run_in_which_it_does_not_act():
    said = {"text_encoder": 0.5, "unet": 0.5}
    assert Mention("ink", 0.5, 0.5, stop=10).scales("sd", 20) == said | {"steps": [[0.5, 1, 0]]}
    assert Mention("ink", 0.5, 0.5, start=5, stop=10).scales("sd", 20) == said | {
        "steps": [[0, 0.25, 0], [0.5, 1, 0]]
    }
    assert Mention("ink", 0.5, 0.5, stop=0.4).scales("sd", 20) == Mention(
        "ink", 0.5, 0.5, stop=8
    ).scales("sd", 20)
    assert (
        Mention("ink", 0.5, 0.5, start=0, stop=20).scales("sd", 20) == 0.5
    )  # in all steps there are
    assert Mention("ink", 0.5, 0.5, start=30).scales("sd", 20) == said | {"steps": [[0, 1, 0]]}


def test_steps_that_end_before_they_begin_are_refused():
    (mention,) = parse_prompt("<lora:ink:1:step=10-5>")[1]
    with pytest.raises(
        ValueError, match="step=10-5>'.*with 20 steps it would end, at 5, before it begins, at 10"
    ):
        mention.scales("sd", 20)


def test_one_weight_is_a_number():
    assert Mention("ink", 0.5, 0.5).scales("sd", 20) == 0.5


def test_two_weights_are_those_of_the_components():
    assert Mention("ink", 0.5, 0.8).scales("sd", 20) == {"text_encoder": 0.5, "unet": 0.8}
    assert Mention("ink", 0.5, 0.8).scales("sdxl", 20) == {
        "text_encoder": 0.5,
        "text_encoder_2": 0.5,
        "unet": 0.8,
    }


def test_weights_multiply_block_weights():
    mention = Mention("ink", 0.5, 0.8, tuple(n / 16 for n in range(17)))
    scales = mention.scales("sd", 20)
    blocks = from_block_weights(mention.blocks)["unet"]
    assert scales == {"text_encoder": 0, "unet": {"*": 0.8} | blocks}
    assert Mention("ink", 0.5, 0.8, "unet only").scales("sd", 20) == {
        "text_encoder": 0,
        "unet": 0.8,
    }
    style = preset("style blocks", "sdxl")["unet"]
    assert Mention("ink", 1, 0.8, "style blocks").scales("sdxl", 20)["unet"] == {"*": 0.8} | style


@pytest.fixture
def folder(tmp_path):
    """Adapters by file, by folder, by another name, and of the same name."""
    weights = {"x": torch.zeros(1)}
    for name, metadata in (
        ("ink.safetensors", {}),
        (f"mosaic/{WEIGHT_NAME}", {}),
        ("new/cat.safetensors", {}),
        ("new/two.safetensors", {}),
        ("old/cat.safetensors", {}),
        (".cache/x.safetensors", {}),
        ("v1.5_x-000010.safetensors", {"ss_output_name": "sketch"}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(weights, tmp_path / name, metadata)
    return tmp_path


def test_adapters_are_found_by_file_folder_and_trained_name(folder):
    found = {
        name: path.relative_to(folder).as_posix() for name, path in find_adapters(folder).items()
    }
    assert found == {
        "ink": "ink.safetensors",
        "mosaic": f"mosaic/{WEIGHT_NAME}",
        "v1.5_x-000010": "v1.5_x-000010.safetensors",
        "sketch": "v1.5_x-000010.safetensors",
        "new/cat": "new/cat.safetensors",
        "old/cat": "old/cat.safetensors",
        "two": "new/two.safetensors",
    }


def test_a_trained_name_that_two_files_have_is_no_name(folder):
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors", {"ss_output_name": "sketch"})
    assert "sketch" not in find_adapters(folder) and "other" in find_adapters(folder)


def test_a_files_own_name_comes_before_anothers_trained_name(folder):
    save_file({"x": torch.zeros(1)}, folder / "sketch.safetensors")
    assert find_adapters(folder)["sketch"].name == "sketch.safetensors"


def test_a_damaged_file_keeps_its_name(folder):
    (folder / "broken.safetensors").write_bytes(b"no")
    assert "broken" in find_adapters(folder)


def test_the_bundled_adapters_are_found():
    assert {"creatures", "ink", "mosaic", "patch_cat"} <= set(find_adapters(lb.bundled("adapters")))


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere to look for adapters in"):
        find_adapters(tmp_path / "nowhere")


def test_scripts_of_0_5_find_the_parser_by_its_old_name():
    from lorabook.adapters.prompts import parse_prompt as by_its_old_name

    assert by_its_old_name is parse_prompt
