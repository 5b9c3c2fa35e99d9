"""What a run changes for the whole process, and puts back."""

import random
from collections.abc import Callable

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def process_state() -> Callable[[], None]:
    """What puts the process's generators, TF32 and a user's own Accelerator back as they are now.

    Several processes stay connected: the next run in them needs that.
    """
    shared = [
        (state, dict(state._shared_state))
        for state in (AcceleratorState, PartialState, GradientState)
    ]
    numbers, python, tf32 = (
        np.random.get_state(),
        random.getstate(),
        torch.backends.cuda.matmul.allow_tf32,
    )
    cpu, gpus = (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    )

    def put_back() -> None:
        connected = PartialState._shared_state.get("num_processes", 1) > 1
        for state, before in shared:
            if not (connected and state is PartialState):
                state._shared_state.clear()
                state._shared_state.update(before)
        np.random.set_state(numbers)
        random.setstate(python)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        torch.backends.cuda.matmul.allow_tf32 = tf32

    return put_back
