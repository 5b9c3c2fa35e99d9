import pytest
import torch

import lorabook as lb
from adapter_files import ATTENTION, add_random
from lorabook.live import fused_weights
from lorabook.live.inject import source_of
from lorabook.live.layers import lora_layers
from lorabook.live.originals import fused_in


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
    whole, count = getattr(fused_weights, place), iter(range(1000))

    def failing(*args, **kwargs):
        if next(count) == calls:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(fused_weights, place, failing)


@pytest.mark.parametrize(
    "place, calls, error",
    [
        ("take_off", 0, RuntimeError()),
        ("take_off", 1, KeyboardInterrupt()),
        ("original", 20, RuntimeError()),
        ("_write", 1, KeyboardInterrupt()),
        ("base_weight", 100, KeyboardInterrupt()),
        ("put_on", 0, RuntimeError()),
        ("put_on", 2, KeyboardInterrupt()),
        ("put_in_order", 1, RuntimeError()),
    ],
)
def test_a_failure_on_the_way_leaves_weights_and_record_as_they_were(
    two, monkeypatch, place, calls, error
):
    base, before = lb.base_checksum(two), state(two)
    fails_once(monkeypatch, place, error, calls)
    if place in ("take_off", "original", "_write", "base_weight"):
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
    assert state(two) == before and lb.base_checksum(two) == base and not fused_in(two.unet).weights


def test_a_failure_that_stays_loses_no_original(two, monkeypatch):
    base = lb.base_checksum(two)
    lb.fuse(two)

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(fused_weights, "_write", broken)
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


def test_where_an_adapter_came_from_survives_fusing_swapping_and_a_doras_change(pipe):
    lb.load_adapter(pipe, "ink")
    lb.fuse(pipe, {"ink": 1})
    lb.unfuse(pipe)
    assert source_of(pipe, "ink") == "ink"
    lb.swap_adapter(pipe, "ink", "mosaic")
    lb.fuse(pipe)
    lb.unfuse(pipe)
    assert source_of(pipe, "ink") == "mosaic"
    lb.unload_adapters(pipe)
    add_random(pipe, ATTENTION, text=False, use_dora=True)
    pipe.unet.peft_config["random"].came_from = "somewhere"
    lb.set_scales(pipe, {"random": 0.5})
    assert source_of(pipe, "random") == "somewhere"
