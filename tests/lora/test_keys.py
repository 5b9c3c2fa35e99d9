"""Forms of keys by their formulas: the same ΔW, or a sentence that says what a file is; no picture
is drawn here.
"""

import re

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import lorabook as lb
from conftest import tiny_sdxl
from lorabook.live.architecture import family
from lorabook.live.layers import adapter_names, walk
from lorabook.lora.formats.read import parse

UNET = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",
}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
LAYERS = {
    **{("unet", ours): theirs for ours, theirs in UNET.items()},
    ("text_encoder", TEXT): TEXT,
    ("text_encoder_2", TEXT): TEXT,
}


def halves() -> dict:
    """(down, up) of rank 2 by component and module."""
    torch.manual_seed(0)
    return {place: (torch.randn(2, 6), torch.randn(5, 2)) for place in LAYERS}


def file(start: dict, down: str, up: str, *, stability=False, alpha=True) -> dict:
    weights = {}
    for (part, module), (first, second) in halves().items():
        stem = start[part] + (LAYERS[part, module] if stability else module)
        weights |= {f"{stem}.{down}": first, f"{stem}.{up}": second}
        weights |= {f"{stem}.alpha": torch.tensor(1.0)} if alpha else {}
    return weights


def parts(text: str, two: str = "") -> dict:
    """What begins the keys of each component; * stands for its name."""
    return {
        part: (two or text).replace("*", part)
        for part in ("unet", "text_encoder", "text_encoder_2")
    }


OMI = {"unet": "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
COMFY = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
FORMS = {
    "component, then PEFT's wrapper": (
        parts("*.base_model.model."),
        "lora_A.weight",
        "lora_B.weight",
        False,
    ),
    "PEFT's wrapper, then component": (
        parts("base_model.model.*."),
        "lora_A.weight",
        "lora_B.weight",
        False,
    ),
    "component twice": (parts("*.*."), "lora_A.weight", "lora_B.weight", False),
    "wrapper and lora.down": (
        parts("*.base_model.model."),
        "lora.down.weight",
        "lora.up.weight",
        False,
    ),
    "wrapper and lora_down": (
        parts("*.base_model.model."),
        "lora_down.weight",
        "lora_up.weight",
        False,
    ),
    "a name": (parts("*."), "lora_A.my_style.weight", "lora_B.my_style.weight", False),
    "a name with a number": (
        parts("*.base_model.model."),
        "lora_A.default_0.weight",
        "lora_B.default_0.weight",
        False,
    ),
    "OMI": (OMI, "lora_down.weight", "lora_up.weight", True),
    "ComfyUI": (COMFY, "lora_A.weight", "lora_B.weight", True),
    "ComfyUI, lora_down": (COMFY, "lora_down.weight", "lora_up.weight", True),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_delta_of_its_formula(form):
    start, down, up, stability = FORMS[form]
    found = parse(file(start, down, up, stability=stability))
    expected = {
        (part, module): second @ first / 2 for (part, module), (first, second) in halves().items()
    }
    assert {
        (part, module) for part, layers in found.layers.items() for module in layers
    } == expected.keys()
    for (part, module), delta in expected.items():
        assert torch.allclose(found.layers[part][module].delta(), delta, atol=1e-6)


def test_two_adapters_in_one_file_are_told_apart_by_their_names():
    weights = file(parts("*."), "lora_A.one.weight", "lora_B.one.weight", alpha=False)
    weights |= file(parts("*."), "lora_A.two.weight", "lora_B.two.weight", alpha=False)
    with pytest.raises(ValueError, match="holds 2 adapters, 'one' and 'two'"):
        parse(weights)
    assert len(parse({k: v for k, v in weights.items() if ".one." in f"{k}."}).layers) == 3


@pytest.mark.parametrize(
    "ending",
    ["dora_scale", "magnitude", "lora_magnitude_vector", "lora_magnitude_vector.mine.weight"],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_magnitude_is_by_output_or_by_input_as_its_length_says(ending, axis):
    torch.manual_seed(0)
    base, down, up = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    size = torch.rand(5 if axis == 0 else 6) + 0.5
    shaped = (
        size
        if "vector" in ending or ending == "magnitude"
        else size.view(-1, 1)
        if axis == 0
        else size.view(1, -1)
    )
    adapter = parse(
        {
            "unet.conv_in.lora_A.weight": down,
            "unet.conv_in.lora_B.weight": up,
            f"unet.conv_in.{ending}": shaped,
        }
    )
    changed = base + up @ down
    expected = (
        changed
        / changed.norm(dim=1 - axis, keepdim=True)
        * size.view((-1, 1) if axis == 0 else (1, -1))
        - base
    )
    assert torch.allclose(adapter.layers["unet"]["conv_in"].delta(base), expected, atol=1e-5)


PLAIN = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 6),
    "lora_unet_conv_in.lora_up.weight": torch.ones(5, 2),
}
UNREAD = {
    "w_norm": "trained norms",
    "b_norm": "trained norms",
    "diff_b": "differences of biases",
    "diff": "differences of norms",
    "set_weight": "replaced weights",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "lora_embedding_A.mine": "embeddings",
    "lora_B.bias": "biases",
    "lora_B.mine.bias": "biases",
}


@pytest.mark.parametrize("ending", UNREAD)
def test_what_is_not_read_is_refused_by_name_or_passed_over_where_it_is_zero(ending):
    key = f"lora_unet_down_blocks_0_attentions_0_norm.{ending}"
    with pytest.raises(ValueError, match=f"{re.escape(key)} .*{UNREAD[ending]}"):
        parse(PLAIN | {key: torch.ones(3)})
    if ending != "set_weight":  # which a zero changes, too
        adapter = parse(PLAIN | {key: torch.zeros(3)})
        assert (
            adapter.ignored == (key,)
            and UNREAD[ending] in adapter.notes[0]
            and "zero" in adapter.notes[0]
        )


def test_ia3_is_called_that():
    weights = {
        "lora_unet_mid_block_attentions_0_proj_in.weight": torch.ones(3, 1),
        "lora_unet_mid_block_attentions_0_proj_in.on_input": torch.tensor(False),
    }
    with pytest.raises(ValueError, match="IA³"):
        parse(weights)
    with pytest.raises(ValueError, match="is not a LoRA"):
        parse({key: torch.zeros_like(value) for key, value in weights.items()})


OTHERS = {
    "a ControlNet": "controlnet_cond_embedding.conv_in.weight",
    "a VAE": "first_stage_model.encoder.down.0.conv.weight",
    "a T2I-Adapter": "adapter.body.0.in_conv.weight",
    "a whole checkpoint": "model.diffusion_model.input_blocks.0.0.weight",
    "a whole UNet": "conv_in.weight",
    "a whole text encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "a hypernetwork": "768.0.linear.0.weight",
    "a motion module": "down_blocks.0.motion_modules.0.norm.weight",
    "a whole transformer": "double_blocks.0.img_attn.qkv.weight",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_adapter_is_called_what_it_is(kind):
    with pytest.raises(ValueError, match=f"it.safetensors is {kind}"):
        parse({OTHERS[kind]: torch.ones(4, 4)}, where="it.safetensors")


def refusal(pipe, weights, folder, name="it.safetensors") -> str:
    save_file(weights, folder / name)
    with pytest.raises(ValueError) as caught:
        lb.load_adapter(pipe, folder / name)
    text = str(caught.value)
    assert len(text) <= 400 and "\n" not in text and adapter_names(pipe) == []
    return text


def run(text: str, pipe):
    exec(re.search(r"load it with (.+?)( \(bundle_emb|$)", text)[1], {"pipe": pipe})


@pytest.mark.parametrize(
    ("key", "token"), [("<cat>", "<cat>"), ("emb_params", "word"), ("string_to_param.*", "word")]
)
def test_a_textual_inversion_is_called_that_with_the_call_that_loads_it(pipe, tmp_path, key, token):
    text = refusal(
        pipe,
        {key: torch.ones(2, pipe.text_encoder.config.hidden_size)},
        tmp_path,
        "word.safetensors",
    )
    assert "is a textual inversion" in text
    run(text, pipe)
    assert {token, f"{token}_1"} <= pipe.tokenizer.get_vocab().keys()


def test_an_ip_adapter_is_called_that_with_the_call_that_loads_it(pipe, tmp_path):
    width = pipe.text_encoder.config.hidden_size
    weights = {
        "image_proj.proj.weight": torch.ones(4 * width, 16),
        "image_proj.proj.bias": torch.ones(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.ones(width),
    }
    sizes = [
        layer.to_k.weight.shape
        for name, layer in pipe.unet.named_modules()
        if name.endswith("attn2")
    ]
    for number, shape in enumerate(sizes):
        weights |= {
            f"ip_adapter.{2 * number + 1}.to_{half}_ip.weight": torch.ones(shape) for half in "kv"
        }
    text = refusal(pipe, weights, tmp_path)
    assert "is an IP-Adapter" in text
    run(text, pipe)
    assert pipe.unet.encoder_hid_proj is not None


PICKLES = {
    "a textual inversion": {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.ones(2, 128)},
        "name": "w",
    },
    "an IP-Adapter": {
        "image_proj": {"proj.weight": torch.ones(4, 4)},
        "ip_adapter": {"1.to_k": torch.ones(4, 4)},
    },
    "a hypernetwork": {320: [{"linear.0.weight": torch.ones(4, 4)}], "step": 1},
}


@pytest.mark.parametrize("kind", PICKLES)
def test_an_old_pickle_that_is_no_adapter_is_called_what_it_is(pipe, tmp_path, kind):
    torch.save(PICKLES[kind], tmp_path / "word.pt")
    with pytest.raises(ValueError, match=f"word.pt is {kind}") as caught:
        lb.load_adapter(pipe, tmp_path / "word.pt", allow_pickle=True)
    if kind == "a textual inversion":
        run(str(caught.value), pipe)
        assert "word_1" in pipe.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("xl"))


def random_lora(pipe, start: str) -> dict:
    torch.manual_seed(0)
    return {
        f"{start}{name.replace('.', '_')}.lora_{half}.weight": torch.randn(shape)
        for name, layer in walk(pipe.unet)
        if name.endswith("attn2.to_k")
        for half, shape in (("down", (2, layer.in_features)), ("up", (layer.out_features, 2)))
    }


def test_embeddings_in_an_adapters_file_are_told_with_the_calls_that_load_them(large, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(large)
    embeddings = {
        f"bundle_emb.my character.{part}": torch.full((2, 32), 3.0)
        for part in ("clip_g", "clip_l", "clip_g_out")
    }
    save_file(random_lora(pipe, "lora_unet_") | embeddings, tmp_path / "it.safetensors")
    report = lb.load_adapter(pipe, tmp_path / "it.safetensors")
    assert set(report.ignored) == set(
        embeddings
    ) and "embedding (textual inversion) for 'my character'" in str(report)
    run(report.notes[0], pipe)
    for tokenizer, model in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        ids = tokenizer(pipe.maybe_convert_prompt("a my character", tokenizer)).input_ids
        assert (model.get_input_embeddings().weight[ids] == 3).all(dim=1).sum() == 2


def test_a_misfit_names_unknown_layers_and_never_says_that_x_is_not_x(large, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(large)
    weights = random_lora(pipe, "lora_unet_")
    odd = {
        f"unet.odd.{number}.lora_{half}.weight": torch.ones(2, 2)
        for number in "123"
        for half in "AB"
    }
    text = refusal(pipe, weights | odd, tmp_path)
    total = len(weights) // 2
    assert (
        f"only {total} of its {total + 3} layers are there" in text
        and "unet.odd.1" in text
        and "unet.odd.3" in text
    )
    assert "made for" not in text and "form that is not read" in text
    bigger = {key.replace("attentions_1", "attentions_5"): value for key, value in weights.items()}
    assert "both are Stable Diffusion XL" in refusal(pipe, bigger, tmp_path)


FLUX = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.proj": (32, 32),
    "double_blocks.0.img_mlp.0": (128, 32),
}


def by(start: str, shapes: dict, *, flat=False) -> dict:
    torch.manual_seed(0)
    return {
        f"{start}{name.replace('.', '_') if flat else name}.lora_{half}.weight": torch.randn(size)
        for name, (out, rest) in shapes.items()
        for half, size in (("down", (2, rest)), ("up", (out, 2)))
    }


ELSEWHERE = {
    "Flux": by("lora_unet_", FLUX, flat=True),
    "Stable Diffusion 3": by("diffusion_model.", {"joint_blocks.0.x.qkv": (4, 4)}),
    "Wan": by("diffusion_model.", {"blocks.0.self_attn.q": (4, 4)}),
    "Z-Image": by("transformer.", {"layers.0.attention.to_q": (4, 4)}),
    "LTX-Video": by("transformer.", {"transformer_blocks.0.attn1.to_q": (4, 2048)}),
    "PixArt": by("lora_transformer_", {"transformer_blocks.0.attn1.to_q": (4, 1152)}, flat=True),
    "Qwen-Image": by("transformer.", {"transformer_blocks.0.img_mlp.net.0.proj": (4, 4)}),
}


@pytest.mark.parametrize("model", ELSEWHERE)
def test_another_models_file_is_called_that(pipe, tmp_path, model):
    assert f"it was made for {model}" in (text := refusal(pipe, ELSEWHERE[model], tmp_path)), text
    assert f"this is {family(pipe)}" in text


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(None, None, None, None, None, None, model)


def given(pipe, name: str) -> dict:
    return {
        module: layer.get_delta_weight(name).detach()
        for module, layer in pipe.transformer.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.scaling
    }


@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model.", "base_model.model."])
def test_a_transformers_own_names_are_read_as_diffusers_reads_them(start):
    pipe, weights = flux(), by(start, FLUX, flat=start == "lora_unet_")
    lb.load_adapter(pipe, weights, "ours")
    pipe.load_lora_weights(by("lora_unet_", FLUX, flat=True), adapter_name="theirs")
    ours, theirs = given(pipe, "ours"), given(pipe, "theirs")
    assert ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours
    )


def test_diffusers_names_are_read_with_comfyuis_prefix_and_with_underscores():
    torch.manual_seed(0)
    pipe = LTXPipeline(
        None,
        None,
        None,
        None,
        LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    )
    shapes = {
        name: tuple(layer.weight.shape) for name, layer in walk(pipe.transformer) if ".attn" in name
    }
    for number, weights in enumerate(
        (by("diffusion_model.", shapes), by("lora_transformer_", shapes, flat=True))
    ):
        lb.load_adapter(pipe, weights, f"n{number}")
        stems = {
            name: f"lora_transformer_{name.replace('.', '_')}"
            if number
            else f"diffusion_model.{name}"
            for name in shapes
        }
        expected = {
            name: weights[f"{stem}.lora_up.weight"] @ weights[f"{stem}.lora_down.weight"]
            for name, stem in stems.items()
        }
        found = given(pipe, f"n{number}")
        assert found.keys() == expected.keys() and all(
            torch.allclose(found[name], expected[name]) for name in found
        )
    with pytest.raises(ValueError, match="made for Flux.*this is LTX-Video"):
        lb.load_adapter(pipe, by("lora_unet_", FLUX, flat=True))


def test_a_transformers_adapter_is_not_saved_as_kohya_and_comes_back_from_pefts_folder(tmp_path):
    pipe = flux()
    lb.load_adapter(pipe, by("lora_unet_", FLUX, flat=True), "it")
    with pytest.raises(
        ValueError, match="no names for layers of a transformer.*'diffusers' or 'peft'"
    ):
        lb.save_adapter(pipe, tmp_path / "k", "kohya")
    expected = given(pipe, "it")
    for form in ("diffusers", "peft"):
        lb.save_adapter(pipe, tmp_path / form, form)
        lb.load_adapter(other := flux(), tmp_path / form, "it")
        found = given(other, "it")
        assert found.keys() == expected.keys() and all(
            torch.allclose(found[name], expected[name]) for name in found
        )


def test_a_pipeline_that_lacks_a_component_says_which_to_load(pipe, tmp_path):
    save_file(
        random_lora(pipe, "lora_unet_")
        | {
            f"lora_te_{TEXT.replace('.', '_')}.lora_{half}.weight": torch.ones(shape)
            for half, shape in (("down", (2, 128)), ("up", (128, 2)))
        },
        tmp_path / "it.safetensors",
    )
    for absent, rest in (("text_encoder", "unet"), ("unet", "text_encoder")):
        parts = dict(pipe.components) | {absent: None}
        other = type(pipe)(**parts, requires_safety_checker=False)
        with pytest.raises(ValueError, match=rf"layers for {absent}.*components=\['{rest}'\]"):
            lb.load_adapter(other, tmp_path / "it.safetensors")
        assert lb.load_adapter(
            other, tmp_path / "it.safetensors", components=[rest]
        ).layers.keys() == {rest}
