import threading
import time

import numpy as np
import pytest
import torch

import lorabook as lb
from lorabook.live.layers import active_adapters, lora_layers
from lorabook.live.merged_weights import folded
from lorabook.sweeps.batched import generate_image


@pytest.fixture
def two(pipe):
    """A pipeline with two adapters, one of them scaled by block."""
    for name in ("creatures", "ink"):
        lb.load_adapter(pipe, name)
    lb.set_scales(pipe, {"creatures": {"unet": {"*": 0.7, "up": {"block_1": -0.5}}}, "ink": 0.4})
    return pipe


def picture(pipe):
    return np.asarray(
        generate_image(
            pipe, prompt="a red boat", seed=0, num_inference_steps=2, guidance_scale=4.0
        ),
        int,
    )


def scalings(pipe):
    return [dict(layer.scaling) for found in lora_layers(pipe).values() for layer in found.values()]


def test_the_picture_is_the_same_and_no_adapter_works(two):
    plain, seen = picture(two), []
    layer = next(iter(lora_layers(two)["unet"].values()))
    layer.lora_A["ink"].register_forward_hook(lambda *_: seen.append(1))
    with folded(two) as done:
        assert done and abs(picture(two) - plain).max() <= 1 and not seen
    assert (picture(two) == plain).all() and seen


def test_all_is_as_before_afterwards(two):
    before, checksum, active = scalings(two), lb.base_checksum(two), active_adapters(two)
    weights = [
        layer.get_base_layer().weight.data_ptr() for layer in lora_layers(two)["unet"].values()
    ]
    with folded(two):
        assert lb.base_checksum(two) == checksum
    assert (
        lb.base_checksum(two) == checksum
        and scalings(two) == before
        and active_adapters(two) == active
    )
    assert weights == [
        layer.get_base_layer().weight.data_ptr() for layer in lora_layers(two)["unet"].values()
    ]


def test_another_thread_draws_the_same_while_layers_are_folded_and_unfolded(two):
    plain, drawn = picture(two), []
    other = threading.Thread(target=lambda: drawn.extend(picture(two) for _ in range(3)))
    other.start()
    while other.is_alive():
        with folded(two):
            time.sleep(0.02)  # leaves the interpreter to the other
    assert len(drawn) == 3 and all(abs(found - plain).max() <= 1 for found in drawn)


def test_a_model_too_large_for_the_room_has_no_second_copy(two, monkeypatch):
    plain, room = picture(two), {}
    monkeypatch.setattr("lorabook.live.merged_weights.ROOM", 1000)
    with folded(two, room=room) as done:
        assert done and not room and abs(picture(two) - plain).max() <= 1


def test_where_there_is_no_memory_for_the_sums_nothing_is_folded(two, monkeypatch):
    plain, room = picture(two), {}
    with monkeypatch.context() as small:
        small.setattr(
            "torch.addmm",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory")),
        )
        with folded(two, room=room) as done:
            assert not done and not room
    assert (picture(two) == plain).all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_nothing_behind(two, error):
    plain, checksum = picture(two), lb.base_checksum(two)
    with pytest.raises(error, match="inside"), folded(two):
        raise error("inside")
    assert lb.base_checksum(two) == checksum and (picture(two) == plain).all()


def test_the_room_is_written_into_again(two):
    room = {}
    with folded(two, room=room):
        pass
    places = [total.data_ptr() for total in room.values()]
    lb.set_scales(two, {"creatures": 0}, only=True)
    lb.set_scales(two, {"ink": 1})
    plain = picture(two)
    with folded(two, room=room):
        assert abs(picture(two) - plain).max() <= 1
    assert places == [total.data_ptr() for total in room.values()]


def test_it_may_be_within_itself_and_beside_what_is_fused(two):
    lb.fuse(two, {"ink": 0.4})
    plain, checksum = picture(two), lb.base_checksum(two)
    with folded(two) as outer, folded(two) as inner:
        assert outer and not inner and abs(picture(two) - plain).max() <= 1
    assert lb.base_checksum(two) == checksum


def test_only_the_components_that_are_named(two):
    with folded(two, components=["text_encoder"]) as done:
        assert not done


def test_nothing_is_folded_where_it_cannot_be(two):
    checksum = lb.base_checksum(two)
    layer = next(iter(lora_layers(two)["unet"].values()))

    def is_folded():
        with folded(two) as done:
            assert done or lb.base_checksum(two) == checksum
        return done

    lb.set_scales(two, {"ink": {"steps": [[0, 0.5, 0.3]]}})
    assert not is_folded()
    lb.set_scales(two, {"ink": 0.3})
    assert is_folded()
    number = layer.scaling["ink"]
    layer.scaling["ink"] = torch.ones(2, 1, 1)
    assert not is_folded()
    layer.scaling["ink"] = number
    two.unet._hf_hook = object()
    assert not is_folded()
    del two.unet._hf_hook
    lb.disable_adapters(two)
    assert not is_folded()
