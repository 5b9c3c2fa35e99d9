import threading
from pathlib import Path

import pytest
import torch

from lorabook.studio.threads import _openmp, give_threads_back


def own_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(_openmp() is None, reason="torch runs on another OpenMP than GNU's here")
def test_the_pool_goes_and_comes_back():
    seen = {}

    def work():
        torch.set_num_threads(2)
        matrix = torch.randn(600, 600)
        first = matrix.sin().sum()
        seen["busy"] = own_threads()
        give_threads_back()
        seen["given back"] = own_threads()
        seen["same"] = torch.equal(first, matrix.sin().sum())

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert seen["given back"] < seen["busy"] and seen["same"]
