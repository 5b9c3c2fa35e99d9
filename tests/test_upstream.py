"""Canaries: each fails with a sentence when another library gives a public name to what we reach
for.
"""

import inspect
import logging

import peft
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoPipelineForText2Image, ModelMixin

import lorabook as lb
from lorabook.upstream import (
    DTYPE,
    execution_device,
    is_targeted,
    loading_infos,
    pattern_value,
    quiet,
    separate_accelerator,
    uncompiled,
    version_of,
    without_progress_bar,
)


def test_a_pipeline_computes_where_its_models_are_moved_to(pipe):
    assert execution_device(pipe) == torch.device("cpu")
    assert not hasattr(pipe, "execution_device"), (
        "diffusers made it public: use pipe.execution_device"
    )


def test_the_progress_bar_is_put_back(pipe):
    pipe.set_progress_bar_config(desc="mine")
    with without_progress_bar(pipe):
        assert pipe.progress_bar(range(2)).disable
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert not hasattr(pipe, "progress_bar_config"), (
        "diffusers tells the bar's arguments: read them"
    )


def test_the_model_beneath_a_compiled_one_is_found():
    model = torch.nn.Linear(1, 1)
    compiled = torch.compile(model, backend="eager")
    assert uncompiled(compiled) is model and uncompiled(model) is model
    assert not hasattr(compiled, "original_module"), "torch made it public: use it"


def test_the_argument_of_the_precision_is_the_one_that_diffusers_takes(recwarn):
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and DTYPE in ("dtype", "torch_dtype")
    assert not [warning for warning in recwarn if "torch_dtype" in str(warning.message)]


def test_a_pipeline_tells_nobody_what_its_models_lacked():
    with loading_infos() as infos:
        lb.load_pipeline("tiny-sd", device="cpu")
    assert {name for name, _ in infos} >= {"UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"}
    assert ModelMixin.from_pretrained.__name__ == "from_pretrained"
    assert (
        "output_loading_info"
        not in inspect.signature(AutoPipelineForText2Image.from_pretrained).parameters
    ), "diffusers tells it: use output_loading_info of the pipeline"


def test_quiet_puts_the_level_of_diffusers_back():
    library = logging.getLogger("diffusers")
    before = library.level
    with quiet():
        assert library.level == logging.ERROR
    assert library.level == before


def test_an_accelerator_of_ones_own_is_kept_apart():
    with separate_accelerator():
        own = Accelerator(mixed_precision="no")
        with separate_accelerator():
            assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
        assert own.mixed_precision == "no"
        with pytest.raises(ValueError, match="already been initialized"):  # or take the state away
            Accelerator(mixed_precision="bf16")


def test_pefts_settings_say_which_layers_have_weights():
    config = {"target_modules": ["to_q"], "exclude_modules": ["attn2.to_q"]}
    assert is_targeted(config, "mid.attn1.to_q") and not is_targeted(config, "mid.attn2.to_q")
    assert not hasattr(peft, "check_target_module_exists"), "PEFT made it public: import it"


def test_of_two_patterns_that_fit_the_first_counts():
    assert pattern_value({"attn1.to_q": 2, "to_q": 4}, "mid.attn1.to_q") == 2
    assert pattern_value({"to_k": 4}, "mid.attn1.to_q") is None
    assert not hasattr(peft, "get_pattern_key"), "PEFT made it public: import it"


def test_writing_into_a_tensor_is_counted():
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
    assert not hasattr(tensor, "version"), "torch made it public: use tensor.version"
