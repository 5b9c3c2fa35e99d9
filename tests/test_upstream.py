"""Canaries: each fails with a sentence when another library gives a public name to what we reach for."""

import torch

from lorabook.upstream import execution_device, uncompiled, without_progress_bar


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
