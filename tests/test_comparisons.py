import pytest

import lorabook as lb
from lorabook.adapters.layers import active_adapters, adapter_names


@pytest.fixture
def loaded(pipe):
    lb.load_adapter(pipe, "creatures")
    lb.load_adapter(pipe, "ink")
    lb.set_scales(pipe, {"creatures": 0.3, "ink": 0})
    return pipe


def test_methods_are_compared_in_numbers_and_pictures_and_nothing_stays(loaded):
    table = str(lb.scales_of(loaded))
    found = lb.compare_blends(loaded, {"creatures": 0.5, "ink": 0.5}, ["a cat", "a boat"], methods=["cat", "linear", "svd"],
                              num_inference_steps=1)
    assert list(found.reports) == ["cat", "linear", "svd"] and found.reports["cat"].error["total"] < 1e-6
    assert len(found.grid.images) == 2 and len(found.grid.images[0]) == 3 and "linear" in found._repr_html_()
    assert found.grid.images[0][0] != found.grid.images[0][1]
    assert adapter_names(loaded) == ["creatures", "ink"] and active_adapters(loaded) == ["creatures"]
    assert str(lb.scales_of(loaded)) == table


def test_an_error_in_the_middle_leaves_the_pipeline_as_it_was(loaded):
    with pytest.raises(ValueError, match="unknown method 'mean'"):
        lb.compare_blends(loaded, {"creatures": 0.5, "ink": 0.5}, "a cat", methods=["cat", "mean"], num_inference_steps=1)
    assert adapter_names(loaded) == ["creatures", "ink"] and active_adapters(loaded) == ["creatures"]
