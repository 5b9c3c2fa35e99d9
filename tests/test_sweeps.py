import numpy as np
import pytest
import torch

import lorabook as lb

QUICK = dict(num_inference_steps=2)


def test_one_column_a_scale_and_one_row_a_seed(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    grid = lb.sweep(pipe, "a red cat", columns={"quick": [0, 0.5, 1]}, rows={"seed": [3, 4]}, **QUICK)
    assert [len(row) for row in grid.images] == [3, 3]
    assert list(grid.columns) == ["quick 0", "quick 0.5", "quick 1"] and list(grid.rows) == ["seed 3", "seed 4"]


def test_a_cell_is_the_ordinary_call_with_the_seed_as_its_generator(pipe):
    grid = lb.sweep(pipe, "a red cat", columns={"seed": [5]}, guidance_scale=3.0, **QUICK)
    plain = pipe("a red cat", guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(5), **QUICK).images[0]
    assert np.array_equal(grid.images[0][0], plain)


def test_scales_are_put_back(pipe, quick_run):
    lb.load_adapter(pipe, quick_run, "quick")
    lb.set_scales(pipe, {"quick": 0.3})
    before = pipe("a red cat", generator=torch.Generator().manual_seed(0), **QUICK).images[0]
    lb.sweep(pipe, "a red cat", columns={"quick": [0, 2]}, **QUICK)
    assert np.array_equal(before, pipe("a red cat", generator=torch.Generator().manual_seed(0), **QUICK).images[0])


def test_prompts_guidance_and_steps_can_vary(pipe):
    grid = lb.sweep(pipe, columns={"prompt": ["a red cat", "a blue boat"]}, rows={"guidance_scale": [1.5, 4.0]}, **QUICK)
    assert list(grid.columns) == ["a red cat", "a blue boat"] and list(grid.rows) == ["guidance 1.5", "guidance 4"]
    steps = lb.sweep(pipe, "a red cat", columns={"num_inference_steps": [1, 3]})
    assert not np.array_equal(*steps.images[0])


def test_an_unknown_axis_lists_what_can_vary(pipe):
    with pytest.raises(ValueError, match="'sead' cannot vary.*seed.*none loaded"):
        lb.sweep(pipe, "a red cat", columns={"sead": [1]})


@pytest.mark.parametrize("columns", [{}, {"seed": [1], "prompt": ["x"]}, [1, 2]])
def test_an_axis_is_a_dictionary_with_one_entry(pipe, columns):
    with pytest.raises(ValueError, match="one entry"):
        lb.sweep(pipe, "a red cat", columns=columns)


def test_the_same_axis_twice_is_an_error(pipe):
    with pytest.raises(ValueError, match="both vary 'seed'"):
        lb.sweep(pipe, "a red cat", columns={"seed": [1]}, rows={"seed": [2]})


def test_an_axis_without_values_is_an_error(pipe):
    with pytest.raises(ValueError, match="no values"):
        lb.sweep(pipe, "a red cat", columns={"seed": []})


def test_a_prompt_is_needed(pipe):
    with pytest.raises(ValueError, match="needs a prompt"):
        lb.sweep(pipe, columns={"seed": [1]})
