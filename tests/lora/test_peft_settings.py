"""Every setting of PEFT's that changes what weights mean: as PEFT and diffusers read it, refused by
name, or named.
"""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import lorabook as lb
from lorabook.lora.formats.keys import METADATA_KEY
from lorabook.lora.formats.peft_settings import settings_of
from lorabook.lora.formats.read import parse
from lorabook.lora.source import read_source

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def weights(rank=4, module=Q, prefix=""):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"{prefix}{module}.lora_B.weight": torch.randn(32, rank, generator=generator),
    }


def scaling(config, rank=4, module=Q):
    (layer,) = parse(weights(rank, module), configs={None: config}).layers["unet"].values()
    return layer.scaling


def unet():
    return UNet2DConditionModel.from_pretrained(lb.bundled("tiny-sd"), subfolder="unet")


def trained(folder, **told):
    """PEFT's folder of a UNet's adapter as after a training; returns the UNet."""
    torch.manual_seed(0)
    wrapped = get_peft_model(
        unet(), LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["mid_block.*to_q"]) | told)
    )
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
    wrapped.save_pretrained(folder)
    return wrapped


def changes(pipe):
    """What each layer adds, by PEFT's own get_delta_weight, and by how much its base is another
    than the bundled one.
    """
    base = dict(unet().named_modules())
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        + module.get_base_layer().weight
        - base[name].weight
        for name, module in pipe.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_every_setting_of_the_installed_peft_is_known():
    kinds = (LoraConfig, LoHaConfig, LoKrConfig)
    fields = {field.name: 3 for kind in kinds for field in dataclasses.fields(kind)}
    refused = set()
    while True:
        settings = {name: value for name, value in fields.items() if name not in refused}
        try:
            notes = settings_of({None: settings | {"peft_type": "LORA"}}, {}, "it")[1]
            break
        except ValueError as error:
            refused.add(re.search(r"setting (\w+)=", str(error))[1])
    assert not any("not known here" in note for note in notes)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_an_adapter_gives_what_pefts_own_loader_gives_whatever_it_began_with(pipe, tmp_path, init):
    targets = r"mid_block.*attn\d\.to_(q|out\.0)"
    trained(tmp_path, init_lora_weights=init, target_modules=targets, lora_alpha=6)
    theirs = changes(PeftModel.from_pretrained(unet(), str(tmp_path)).base_model.model)
    report = lb.load_adapter(pipe, tmp_path, "it")
    for name, change in changes(pipe.unet).items():
        assert (change - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    assert report.layers == {"unet": len(theirs)} and not report.notes and not report.missing


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_a_pissa_is_written_as_the_lora_that_it_is(pipe, tmp_path, form):
    trained(tmp_path / "it", init_lora_weights="pissa", target_modules=r"mid_block.*attn1\.to_q")
    assert "PiSSA" in lb.load_adapter(pipe, tmp_path / "it", "it").kinds
    with pytest.raises(ValueError, match="a PiSSA's ΔW depends on the base model's weights"):
        lb.save_adapter(tmp_path / "it", tmp_path / "no", form)
    lb.save_adapter(pipe, tmp_path / "out", form)
    (again,) = read_source(tmp_path / "out").adapter.layers["unet"].values()
    (change,) = changes(pipe.unet).values()
    assert again.rank == 8 and (again.delta() - change).norm() <= 1e-4 * change.norm()
    assert "numbers are of its LoRA part" in str(lb.inspect_adapter(tmp_path / "it"))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "something", 3])
def test_a_beginning_that_cannot_be_computed_is_refused_with_the_remedy(init):
    with pytest.raises(
        ValueError, match=f"init_lora_weights={init!r}.*path_initial_model_for_weight_conversion"
    ):
        parse(weights(), configs={None: {"r": 4, "lora_alpha": 4, "init_lora_weights": init}})


@pytest.mark.parametrize(
    "setting, value",
    [
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["conv_in"]),
        ("use_qalora", True),
        ("target_parameters", ["x.weight"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"a": 1}),
    ],
)
@pytest.mark.parametrize("in_metadata", [False, True])
def test_a_setting_that_changes_more_than_the_factors_say_is_refused_by_name(
    setting, value, in_metadata
):
    config = {"r": 4, "lora_alpha": 4, setting: value}
    about = {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    with pytest.raises(ValueError, match=f"its setting {setting}=") as told:
        parse(
            weights(),
            about if in_metadata else None,
            configs=None if in_metadata else {None: config},
        )
    assert len(str(told.value)) <= 400


@pytest.mark.parametrize("kind", ["ADALORA", "IA3", "OFT", "BOFT", "VERA", "XLORA", "HRA"])
def test_another_kind_of_pefts_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"is a {kind} of PEFT's, by its setting peft_type"):
        parse(weights(), configs={None: {"peft_type": kind}})


def test_pefts_own_adalora_is_refused_by_name(tmp_path):
    model = get_peft_model(unet(), AdaLoraConfig(target_modules=["to_q"], total_step=10))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ADALORA of PEFT's"):
        lb.inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"r": 4, "lora_alpha": 16}, 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8),
        ({"r": 4, "lora_alpha": 0}, 0),
        ({"r": 4, "lora_alpha": -2}, -0.5),
        ({"r": 4, "lora_alpha": 1.5}, 0.375),
        ({"r": 4}, 2),
        ({"r": 4, "alpha": 2, "peft_type": "LOHA"}, 0.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"o_q": 2}}, 1),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"^to_q": 2}}, 1),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"attn\d\.to_(q|k)": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {rf"^{Q}": 2, "to_q": 8}}, 0.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"down_blocks.*": 2}, "use_rslora": True}, 1),
        ({"r": 4, "lora_alpha": 4, "fan_in_fan_out": True}, 1),
    ],
)
def test_a_strength_is_what_peft_makes_of_it(config, expected):
    assert scaling(config) == expected


@pytest.mark.parametrize(
    "name, value",
    [
        ("r", None),
        ("r", "4"),
        ("r", 0),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("lora_alpha", [1]),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", True),
        ("rank_pattern", []),
        ("alpha_pattern", "x"),
        ("alpha_pattern", {"(": 2}),
        ("alpha_pattern", {"to_q": None}),
        ("use_rslora", "no"),
        ("layers_to_transform", {}),
        ("exclude_modules", 5),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(name, value):
    adapter = parse(weights(), configs={None: {"r": 4, "lora_alpha": 4, name: value}})
    assert any(f"its setting {name}" in note for note in adapter.notes)
    assert adapter.layers["unet"][Q].scaling == 1


@pytest.mark.parametrize("text", ["[1, 2]", '"r"', "null", "3", "{", "[" * 5000])
def test_metadata_of_another_shape_are_named(text):
    adapter = parse(weights(), {METADATA_KEY: text})
    assert "lora_adapter_metadata holds no settings by name" in adapter.notes[0] and adapter.missing


def test_settings_that_no_one_knows_are_named_in_the_report(pipe, tmp_path):
    save_file(weights(), tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 4, "use_magic": True, "strange_scale": 3, "unset": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = lb.load_adapter(pipe, tmp_path, "it")
    assert "settings that are not known here and were passed over: strange_scale, use_magic" in str(
        report
    )
    assert "unset" not in str(report)


@pytest.mark.parametrize("bare", [True, False])
def test_diffusers_metadata_are_read_with_a_component_before_the_name_and_without(bare):
    told = {"r": 4, "lora_alpha": 16, "target_modules": ["to_q"]}
    about = {
        METADATA_KEY: json.dumps(
            told if bare else {f"unet.{key}": value for key, value in told.items()}
        )
    }
    assert settings_of(None, about, "it")[0] == {None if bare else "unet": told}
    assert parse(weights(prefix="" if bare else "unet."), about).layers["unet"][Q].scaling == 4


@pytest.mark.parametrize(
    "told",
    [
        {
            "use_rslora": True,
            "alpha_pattern": {"mid_block.*to_q": 1.0},
            "rank_pattern": {r"up_blocks\.1.*to_q": 2},
        },
        {"use_dora": True},
    ],
)
def test_what_save_lora_adapter_wrote_comes_back_as_diffusers_reads_it(pipe, tmp_path, told):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False, **told)
    theirs = unet()
    theirs.add_adapter(config, "it")
    theirs.save_lora_adapter(tmp_path, adapter_name="it")
    lb.load_adapter(pipe, tmp_path, "it")
    own = dict(pipe.unet.named_modules())
    for name, layer in theirs.named_modules():
        if isinstance(layer, LoraLayer):
            x = torch.randn(1, 3, layer.in_features)
            assert torch.allclose(own[name](x), layer(x), atol=1e-4), name


@pytest.mark.parametrize(
    "told",
    [
        {"exclude_modules": ["attn2.to_q"]},
        {"exclude_modules": r".*attn2\.to_q"},
        {"layers_to_transform": [1], "layers_pattern": ["attentions"]},
    ],
)
def test_layers_that_the_settings_leave_out_are_left_out_as_by_peft(pipe, tmp_path, told):
    trained(tmp_path, target_modules=["to_q"])
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | told
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = changes(PeftModel.from_pretrained(unet(), str(tmp_path)).base_model.model)
    report = lb.load_adapter(pipe, tmp_path, "it")
    assert changes(pipe.unet).keys() == theirs.keys() and "left out by its settings" in str(report)


@pytest.mark.parametrize("told, has", [(True, False), (False, True)])
def test_a_dora_without_magnitudes_or_a_lora_with_them_is_refused(told, has):
    held = weights() | ({f"{Q}.lora_magnitude_vector": torch.ones(32)} if has else {})
    with pytest.raises(ValueError, match=f"its setting use_dora is {told}.*magnitude"):
        parse(held, configs={None: {"r": 4, "lora_alpha": 4, "use_dora": told}})


def test_a_rank_that_is_not_the_weights_is_named():
    assert (
        "setting r is not the rank"
        in parse(weights(), configs={None: {"r": 8, "lora_alpha": 4}}).notes[0]
    )


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (torch.tensor(2.0).half(), 0.5),
        (torch.tensor([2.0]).bfloat16(), 0.5),
        (torch.tensor([[2]]), 0.5),
        (torch.tensor(-2), -0.5),
        (torch.tensor(0.0), 1),
        (torch.tensor(2.0).to(torch.float8_e4m3fn), 0.5),
    ],
)
def test_kohyas_alpha_is_one_number_of_any_type(alpha, expected):
    stem = f"lora_unet_{Q.replace('.', '_')}"
    down, up = weights().values()
    source = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": alpha,
    }
    adapter = read_source(source).adapter
    assert adapter.layers["unet"][Q].scaling == expected and bool(adapter.missing) == (
        expected == 1
    )


@pytest.mark.parametrize(
    "alpha, match",
    [
        (torch.ones(2), "alpha of layer .*to_q has 2 numbers"),
        (torch.tensor(float("nan")), "not finite"),
    ],
)
def test_an_alpha_that_is_none_is_refused(alpha, match):
    with pytest.raises(ValueError, match=match):
        read_source(weights(prefix="unet.") | {f"unet.{Q}.alpha": alpha})


def test_an_alpha_of_zero_in_the_settings_is_no_change_in_any_form(tmp_path, pipe):
    adapter = parse(weights(), configs={None: {"r": 4, "lora_alpha": 0}})
    for form in ("diffusers", "kohya", "peft"):
        lb.save_adapter(adapter, tmp_path / form, form)
        assert not read_source(tmp_path / form).adapter.layers["unet"][Q].delta().any()
    lb.load_adapter(pipe, adapter, "it")
    lb.set_scales(pipe, {"it": 0.5})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_work_as_what_they_stand_for(pipe, tmp_path, dtype):
    held = {
        key: value.to(dtype)
        for key, value in load_file(read_source("ink").path).items()
        if "mid_block" in key
    }
    save_file(held, tmp_path / "small.safetensors")
    save_file({key: value.float() for key, value in held.items()}, tmp_path / "large.safetensors")
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    assert lb.inspect_adapter(small).norm == lb.inspect_adapter(large).norm > 0
    lb.resize_adapter(small, tmp_path / "resized.safetensors", rank=2)
    for form in ("diffusers", "kohya", "peft"):
        lb.save_adapter(small, tmp_path / form, form)
    read_back = read_source(tmp_path / "kohya").adapter.layers["unet"]
    assert all(
        torch.equal(layer.delta(), read_back[name].delta())
        for name, layer in read_source(large).adapter.layers["unet"].items()
    )
    assert lb.load_adapter(pipe, held, "from_memory").matched == len(held)
    lb.load_adapter(pipe, small, "small")
    lb.interference(small, large)
