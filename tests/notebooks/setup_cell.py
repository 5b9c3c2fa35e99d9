import importlib.util
import os
import subprocess
import sys

if not getattr(importlib.util.find_spec("lorabook"), "origin", None):  # Colab, Kaggle: fetch the book; else do nothing
    if not {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & os.environ.keys():
        raise ModuleNotFoundError("this kernel has no lorabook: start it by `make lab`, or `pip install -e` the repository")
    fetch = "git clone -q --depth 1 https://github.com/lorabook/lorabook /tmp/lorabook-book"
    if not os.path.isdir("/tmp/lorabook-book") and subprocess.call(fetch.split()):
        raise ConnectionError("the book could not be fetched: is there internet? On Kaggle, the notebook's settings have it")
    sys.path.insert(0, "/tmp/lorabook-book")
    from lorabook.bootstrap import mend
    mend()
