import pytest
import torch

import lorabook as lb
from conftest import tiny_sdxl
from lorabook.live.prompt_weighting import _chunks, encode, parse_emphasis

WORDS = "a red cat on a white background"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A pipeline of SDXL's topology."""
    return lb.load_pipeline(tiny_sdxl(tmp_path_factory.mktemp("models")), device="cpu")


def own(pipe, prompt, negative=None, **more):
    """What the pipeline's own encoding gives, in its call's words."""
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    told = dict(
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative,
    )
    return dict(zip(names, pipe.encode_prompt(prompt, **told | more), strict=False))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def lengths(pipe, prompt):
    """How many tokens each chunk has."""
    return [len(chunk) for chunk in _chunks(pipe, prompt, pipe.tokenizer)]


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("a red cat", [[("a red cat", 1)]]),
        ("", [[("", 1)]]),
        ("a (red) cat", [[("a ", 1), ("red", 1.1), (" cat", 1)]]),
        ("a ((red)) cat", [[("a ", 1), ("red", 1.1**2), (" cat", 1)]]),
        ("a (red:1.4) cat", [[("a ", 1), ("red", 1.4), (" cat", 1)]]),
        ("a (red: -0.5 ) cat", [[("a ", 1), ("red", -0.5), (" cat", 1)]]),
        ("a [red] cat", [[("a ", 1), ("red", 1 / 1.1), (" cat", 1)]]),
        ("([red]:1.2)", [[("red", 1.2 / 1.1)]]),
        ("(a (red:1.5) cat:2)", [[("a ", 2), ("red", 3), (" cat", 2)]]),
        ("(red)(cat)", [[("redcat", 1.1)]]),
        (r"a \(red\) \[cat\] \\", [[(r"a (red) [cat] " + "\\", 1)]]),
        ("a (red cat", [[("a ", 1), ("red cat", 1.1)]]),
        ("a [red ((cat", [[("a ", 1), ("red ", 1 / 1.1), ("cat", 1.1**2 / 1.1)]]),
        ("a red) cat]", [[("a red) cat]", 1)]]),
        ("red: a cat:1.4", [[("red: a cat:1.4", 1)]]),
        ("a red cat BREAK (sand)", [[("a red cat", 1), ("", 1)], [("sand", 1.1)]]),
        ("(red BREAK cat:1.2)", [[("red", 1.2)], [("cat", 1.2)]]),
        ("BREAKFAST", [[("BREAKFAST", 1)]]),
    ],
)
def test_brackets_weigh_as_in_a1111(prompt, parts):
    found = [[(text, weight) for text, weight in part if text] for part in parse_emphasis(prompt)]
    wanted = [[(text, pytest.approx(weight)) for text, weight in part if text] for part in parts]
    assert found == wanted


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a (red:1.2.3) cat", "':1.2.3\\)' has a weight that is no number"),
        ("a [red:blue:0.5] cat", r"\[red:blue:0.5\]' is prompt editing"),
        ("a [red:10] cat", "prompt editing"),
        ("a [red|blue] cat", "prompt editing"),
        ("a [[red]:0.5] cat", r"'\[\[red\]:0.5\]' is prompt editing"),
        ("a [[[b]]:2]", "prompt editing"),
        ("a [[red:blue:0.3]:cat:0.7]", r"'\[red:blue:0.3\]' is prompt editing"),
        ("[(red:1.2)::1e-1]", "prompt editing"),
        ("cat AND dog", "'cat AND dog' is a composed prompt.*write «and»"),
        ("cat :1.2 AND dog :0.5", "composed prompt"),
        ("black AND white", "write «and»"),
        ("(cat AND (dog:1.2))", "composed"),
        ("AND a cat", "composed"),
    ],
)
def test_what_is_no_emphasis_is_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_emphasis(prompt)


def test_emphasis_in_square_brackets_is_no_prompt_editing():
    assert parse_emphasis("[(red:1.1)]") == [[("red", pytest.approx(1))]]


@pytest.mark.parametrize(
    "prompt", ["black and white", "sand, SAND, ANDES, b_AND_w", "{a|b} __color__ cat"]
)
def test_words_that_only_look_like_syntax_stay_words(prompt):
    assert parse_emphasis(prompt) == [[(prompt, 1)]]


def test_escaped_brackets_are_no_prompt_editing():
    assert parse_emphasis(r"\[a:b:0.5\]") == [[("[a:b:0.5]", 1)]]


@pytest.mark.parametrize("negative", [None, "", "blurry, dark"])
def test_without_emphasis_the_embeddings_are_the_pipelines_own(pipe, sdxl, negative):
    assert same(encode(pipe, WORDS, negative), own(pipe, WORDS, negative))
    assert same(encode(sdxl, WORDS, negative), own(sdxl, WORDS, negative))


def test_clip_skip_takes_an_earlier_layer(pipe, sdxl):
    assert same(encode(sdxl, WORDS, "dark", clip_skip=1), own(sdxl, WORDS, "dark", clip_skip=1))
    # diffusers 0.42 itself fails here with transformers 5, whose text encoder has no `text_model`
    ids = pipe.tokenizer(WORDS, padding="max_length", return_tensors="pt").input_ids
    layer = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    ours = encode(pipe, WORDS, "dark", clip_skip=1)
    model = getattr(
        pipe.text_encoder, "text_model", pipe.text_encoder
    )  # older versions of transformers have it
    assert torch.equal(ours["prompt_embeds"], model.final_layer_norm(layer))
    assert torch.equal(
        ours["negative_prompt_embeds"], own(pipe, WORDS, "dark")["negative_prompt_embeds"]
    )


def test_a_full_chunk_is_still_the_pipelines_own(pipe):
    prompt = " ".join(["red"] * 75)
    assert same(encode(pipe, prompt), own(pipe, prompt))


def test_text_encoder_adapters_act(pipe):
    before = encode(pipe, "a drawing of sks cat")["prompt_embeds"]
    lb.load_adapter(pipe, "patch_cat")
    after = encode(pipe, "a drawing of sks cat")
    assert not torch.equal(before, after["prompt_embeds"]) and same(
        after, own(pipe, "a drawing of sks cat")
    )


def test_a_calls_own_scale_acts_on_the_text_encoder_and_goes(pipe):
    lb.load_adapter(pipe, "patch_cat")
    full = encode(pipe, WORDS)
    assert same(encode(pipe, WORDS, lora_scale=0.5), own(pipe, WORDS, lora_scale=0.5))
    assert same(encode(pipe, WORDS), full)


def weighted(plain, weights):
    """A1111's arithmetic, written out: (1, 77, width) times the weights by place, at the old mean."""
    by_token = torch.ones(77)
    for place, weight in weights.items():
        by_token[place] = weight
    changed = plain * by_token[:, None]
    return changed * plain.mean() / changed.mean()


def test_tokens_are_multiplied_and_the_mean_restored(pipe):
    plain, ours = (
        own(pipe, WORDS)["prompt_embeds"],
        encode(pipe, "a (red:1.5) [cat] on a white background")["prompt_embeds"],
    )
    torch.testing.assert_close(ours, weighted(plain, {2: 1.5, 3: 1 / 1.1}))
    torch.testing.assert_close(ours.mean(), plain.mean())


def test_negative_prompts_have_emphasis_too(pipe):
    ours = encode(pipe, WORDS, "(dark:1.3)")["negative_prompt_embeds"]
    plain = own(pipe, WORDS, "dark")["negative_prompt_embeds"]
    length = len(pipe.tokenizer("dark").input_ids) - 2
    torch.testing.assert_close(ours, weighted(plain, dict.fromkeys(range(1, 1 + length), 1.3)))


def test_sdxls_encoders_have_a_mean_each_and_the_pooled_vector_no_weight(sdxl):
    plain, ours = own(sdxl, WORDS), encode(sdxl, "a (red:1.5) cat on a white background")
    parts = [weighted(part, {2: 1.5}) for part in plain["prompt_embeds"].split(32, dim=-1)]
    torch.testing.assert_close(ours["prompt_embeds"], torch.cat(parts, -1))
    assert torch.equal(ours["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])


def test_long_prompts_are_chunks_encoded_by_themselves(pipe, sdxl):
    for model in (pipe, sdxl):
        ours = encode(model, " ".join(["red"] * 75 + ["cat"] * 10), "dark")
        first, second = (
            own(model, " ".join(["red"] * 75), "dark"),
            own(model, " ".join(["cat"] * 10), ""),
        )
        assert torch.equal(
            ours["prompt_embeds"], torch.cat([first["prompt_embeds"], second["prompt_embeds"]], 1)
        )
        padded = torch.cat([first["negative_prompt_embeds"], second["negative_prompt_embeds"]], 1)
        assert torch.equal(ours["negative_prompt_embeds"], padded)
        assert torch.equal(
            ours.get("pooled_prompt_embeds", torch.ones(1)),
            first.get("pooled_prompt_embeds", torch.ones(1)),
        )


@pytest.mark.parametrize(
    "before, chunks", [(54, [75, 10]), (55, [56, 29]), (74, [75, 10]), (75, [75, 10])]
)
def test_a_full_chunk_ends_at_a_comma_among_its_last_twenty(pipe, before, chunks):
    prompt = " ".join(["red"] * before) + ", " + " ".join(["cat"] * (84 - before))
    assert lengths(pipe, prompt) == chunks


def test_break_begins_a_new_chunk(pipe):
    assert lengths(pipe, "a red cat BREAK on sand") == [
        3,
        len(pipe.tokenizer("on sand").input_ids) - 2,
    ]
    assert lengths(pipe, "a red cat BREAK") == [3] and lengths(pipe, "BREAK a red cat") == [0, 3]
    ours = encode(pipe, "a red cat BREAK a blue cat")["prompt_embeds"]
    assert torch.equal(
        ours,
        torch.cat([own(pipe, f"a {color} cat")["prompt_embeds"] for color in ("red", "blue")], 1),
    )


def test_textual_inversions_of_several_vectors_act(pipe):
    pipe.load_textual_inversion(
        {"<patch>": torch.randn(2, 128, generator=torch.Generator().manual_seed(0))}, "<patch>"
    )
    prompt = "a red <patch> on sand"
    assert same(encode(pipe, prompt), own(pipe, prompt)) and lengths(pipe, "(<patch>:1.2)") == [2]


def test_half_precision_stays_half(pipe):
    pipe.text_encoder.to(torch.bfloat16)
    assert encode(pipe, "a (red:1.2) cat")["prompt_embeds"].dtype == torch.bfloat16


def test_a_long_prompt_warns_of_nothing(pipe, silent, caplog):
    encode(pipe, " ".join(["red"] * 200))
    assert not caplog.records


@pytest.mark.parametrize(
    "prompt, message",
    [(["a cat"], r"prompt must be a text, not \['a cat'\]"), (None, "prompt must")],
)
def test_only_one_text_is_encoded(pipe, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode(pipe, prompt)


def test_other_pipelines_are_refused(pipe):
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="was loaded without a text encoder"):
        encode(pipe, "a cat")
    pipe.unet = None
    with pytest.raises(ValueError, match="emphasis is for Stable Diffusion and SDXL pipelines"):
        encode(pipe, "a cat")
