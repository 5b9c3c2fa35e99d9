import pytest
import torch

import lorabook as lb
from adapter_files import add_random
from lorabook.live import merged_weights as fusing
from lorabook.live.inject import source_of
from lorabook.live.layers import lora_layers


@pytest.fixture
def two(small, tmp_path):
    """A pipeline with two adapters, of UNet and text encoder."""
    lb.unload_adapters(small)
    add_random(small)
    lb.save_adapter(small, tmp_path / "first")
    lb.load_adapter(small, tmp_path / "first", "second")
    lb.set_scales(small, {"random": 0.7})
    return small


def state(pipe) -> tuple:
    """The weights, what is fused, what is beside them and how strongly."""
    beside = {
        (part, module): (dict(layer.scaling), list(layer.active_adapters))
        for part, layers in lora_layers(pipe).items()
        for module, layer in layers.items()
    }
    return (
        lb.base_checksum(pipe),
        [(row.name, row.fused, row.active) for row in lb.list_adapters(pipe)],
        beside,
    )


def fails_once(monkeypatch, place, error, calls: int):
    """Let a function fail at one of its calls, and work before and after."""
    whole, count = getattr(fusing, place), iter(range(1000))

    def failing(*args, **kwargs):
        if next(count) == calls:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(fusing, place, failing)


@pytest.mark.parametrize(
    "place, calls, error",
    [
        ("delete_adapter", 0, RuntimeError()),
        ("delete_adapter", 1, KeyboardInterrupt()),
        ("original_weight", 20, RuntimeError()),
        ("_write", 1, KeyboardInterrupt()),
        ("base_weight", 60, KeyboardInterrupt()),
        ("attach_adapter", 0, RuntimeError()),
        ("attach_adapter", 2, KeyboardInterrupt()),
        ("reorder", 1, RuntimeError()),
    ],
)
def test_a_failure_on_the_way_leaves_weights_and_record_as_they_were(
    two, monkeypatch, place, calls, error
):
    base, before = lb.base_checksum(two), state(two)
    fails_once(monkeypatch, place, error, calls)
    if place in ("delete_adapter", "original_weight", "_write", "base_weight"):
        with pytest.raises(type(error)):
            lb.fuse(two)
        assert state(two) == before
    monkeypatch.undo()
    lb.fuse(two)
    fused = state(two)
    fails_once(monkeypatch, place, error, calls)
    with pytest.raises(type(error)):
        lb.unfuse(two)
    assert state(two) == fused
    monkeypatch.undo()
    lb.unfuse(two)
    assert (
        state(two) == before
        and lb.base_checksum(two) == base
        and not two.unet.lorabook.base_weights
    )


def test_a_failure_that_stays_loses_no_original(two, monkeypatch):
    base = lb.base_checksum(two)
    lb.fuse(two)

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(fusing, "_write", broken)
    with pytest.raises(MemoryError):
        lb.unfuse(two)
    monkeypatch.undo()
    lb.unfuse(two)
    assert lb.base_checksum(two) == base


def test_unfusing_one_that_overflows_the_rest_changes_nothing():
    pipe = lb.load_pipeline("tiny-sd", device="cpu", dtype=torch.float16)
    lb.load_adapter(pipe, "ink", "plus")
    lb.load_adapter(pipe, "ink", "minus")
    base = lb.base_checksum(pipe)
    lb.fuse(pipe, {"plus": 1e6, "minus": -1e6})
    fused = lb.base_checksum(pipe)
    with pytest.raises(ValueError, match="infinite in float16"):
        lb.unfuse(pipe, "minus")
    assert lb.base_checksum(pipe) == fused and [row.fused for row in lb.list_adapters(pipe)] == [
        True,
        True,
    ]
    lb.unfuse(pipe)
    assert lb.base_checksum(pipe) == base


def test_where_an_adapter_came_from_survives_fusing_and_swapping(pipe):
    lb.load_adapter(pipe, "ink")
    lb.fuse(pipe, {"ink": 1})
    lb.unfuse(pipe)
    assert source_of(pipe, "ink") == "ink"
    lb.swap_adapter(pipe, "ink", "mosaic")
    lb.fuse(pipe)
    lb.unfuse(pipe)
    assert source_of(pipe, "ink") == "mosaic"
