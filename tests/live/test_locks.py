import threading
import time

import pytest
from diffusers import StableDiffusionImg2ImgPipeline

import lorabook as lb
from lorabook.live.state import PipelineLock, lock_of, locked


def in_another_thread(act):
    """What another thread gets from a call, and whether it has come to its end within half a
    second.
    """
    found = []
    thread = threading.Thread(target=lambda: found.append(act()), daemon=True)
    thread.start()
    thread.join(0.5)
    return found, thread


def test_pipelines_that_share_a_unet_share_the_lock_and_others_do_not(pipe):
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    assert (
        lock_of(other) is lock_of(pipe) is lock_of(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    )
    assert lock_of(lb.load_pipeline("tiny-sd", device="cpu")) is not lock_of(pipe)


def test_what_is_no_pipeline_waits_for_nobody():
    with lock_of("ink.safetensors"):
        assert in_another_thread(lambda: lock_of("ink.safetensors").acquire(0))[0] == [True]


def test_its_owner_takes_it_again_and_others_wait(pipe):
    with lock_of(pipe), lock_of(pipe):
        assert lock_of(pipe).is_mine() and in_another_thread(lambda: lock_of(pipe).acquire(0.01))[
            0
        ] == [False]
    assert in_another_thread(lambda: lock_of(pipe).acquire(0.01))[0] == [True]


def test_who_lets_it_go_comes_after_who_waits():
    lock, order = PipelineLock(), []

    def again_and_again():
        for _ in range(5):
            with lock:
                order.append("worker")
                time.sleep(0.05)

    worker = threading.Thread(target=again_and_again)
    worker.start()
    time.sleep(0.02)
    with lock:
        order.append("cell")
    worker.join()
    assert order.index("cell") <= 2


def test_an_error_lets_it_go(pipe):
    @locked
    def fails(pipe):
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails(pipe=pipe)
    assert not lock_of(pipe).is_mine()


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: lb.set_scales(pipe, {"ink": 0.5}),
        lambda pipe: lb.scales_of(pipe),
        lambda pipe: lb.list_adapters(pipe),
        lambda pipe: lb.load_adapter(pipe, "creatures"),
        lambda pipe: lb.fuse(pipe),
        lambda pipe: lb.base_checksum(pipe),
        lambda pipe: lb.fused(pipe).__enter__(),
        lambda pipe: lb.disable_adapters(pipe),
        lambda pipe: lb.save_adapter(source=pipe, target="nowhere"),
        lambda pipe: lb.remove_adapter(pipe, "ink"),
        lambda pipe: lb.sweep(pipe, "a cat", columns={"seed": [0]}, num_inference_steps=1),
        lambda pipe: lb.generate(pipe, "a cat", num_inference_steps=1),
        lambda pipe: lb.blend(pipe, {"ink": 1}, new_name="more"),
        lambda pipe: lb.move_adapter(pipe, "ink", "cpu"),
        lambda pipe: lb.extract_adapter(pipe, lb.load_pipeline("tiny-sd", device="cpu"), 2),
        lambda pipe: lb.interference("ink", "creatures", pipe=pipe),
    ],
)
def test_calls_wait_while_another_thread_has_the_pipeline(
    pipe_with_ink, call, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with lock_of(pipe_with_ink):
        found, thread = in_another_thread(lambda: call(pipe_with_ink))
        assert not found and thread.is_alive()
    thread.join(120)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared():
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe_with_ink(shared):
    lb.load_adapter(shared, "ink")
    yield shared
    if "ink" in [row.name for row in lb.list_adapters(shared) if row.fused]:
        lb.unfuse(shared)
    lb.unload_adapters(shared)
