import json
import os
import shutil
import subprocess
import sys
import types
from importlib.metadata import version

import peft
import pytest
import torch

from lorabook import checkup
from lorabook.bootstrap import Misfit, Requirement, requirements
from lorabook.checkup import Check, Checkup, doctor

TOKEN = "hf_TokenOfTheTests"


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    for sign in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "HF_HOME"):
        monkeypatch.delenv(sign, raising=False)


@pytest.fixture(scope="module")
def report():
    return doctor()


def test_the_machine_of_the_tests_is_fit(report):
    assert report.fit and {check.verdict for check in report} <= {"ok", "warning"}


def test_each_package_and_each_trap_has_its_line(report):
    names = [check.name for check in report]
    assert names[0] == "Python" and {need.name for need in requirements()} < set(names)
    assert names[-6:] == ["GPU", "disk", "torchao", "a LoRA by peft", "a pipeline by diffusers", "Hub token"]
    assert report["torch"].found == version("torch")


def test_it_shows_itself():
    report = Checkup([Check("disk", "full", "trouble", "rm <x>"), Check("GPU", "slow", "warning"), Check("torch", "2")])
    assert "disk   full   trouble  rm <x>" in str(report) and str(report).endswith("trouble: 1, warning: 1")
    assert "rm &lt;x&gt;</td>" in report._repr_html_() and report[0] is report["disk"] and not report.fit
    assert "all is well" in str(Checkup(report[2:]))


def test_it_names_no_folder_of_this_machine(report):
    assert os.path.expanduser("~") not in str(report) and "/" not in report["disk"].found


def test_the_command_says_the_same_as_json():
    done = subprocess.run([sys.executable, "-m", "lorabook", "doctor", "--json"], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["fit"] is True
    assert {"name": "torch", "found": version("torch"), "verdict": "ok", "mend": ""} in told["checks"]


def test_a_broken_torch_is_told_in_the_table_and_by_the_exit_status(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    done = subprocess.run([sys.executable, "-m", "lorabook", "doctor"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr == ""
    line = next(line for line in done.stdout.splitlines() if line.startswith("GPU"))
    assert "libcudart" in line and "trouble" in line and line.endswith("pip install --force-reinstall torch")


def test_absent_packages_are_told_with_what_installs_them(monkeypatch):
    monkeypatch.setattr(checkup, "version_of", lambda name: None)
    wrong = [Misfit("lorabook", Requirement("peft>=0.20"), None)]
    assert checkup._package("peft", wrong) == Check("peft", "not there; lorabook needs >=0.20", "trouble",
                                                    'pip install "peft>=0.20"')


def test_packages_that_do_not_suit_each_other_are_mended_together():
    wrong = [Misfit("lorabook", Requirement("diffusers>=0.41"), "0.39.0"),
             Misfit("diffusers", Requirement("huggingface-hub<2.0,>=0.34"), "2.4.0")]
    found = checkup._package("diffusers", wrong)
    assert "(older ones fail on text encoders' adapters beside transformers 5.6)" in found.found
    assert found.mend == 'pip install "diffusers>=0.41" "huggingface-hub<2.0,>=0.34"'


def test_widgets_that_jupyterlab_would_not_show_are_a_warning(monkeypatch):
    monkeypatch.setattr(checkup, "version_of", {"ipywidgets": "7.7.1", "jupyterlab_widgets": "3.0.17"}.get)
    told = checkup._package("ipywidgets", [])
    assert told.verdict == "warning" and 'pip install "jupyterlab_widgets<2"' in told.mend
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert checkup._package("ipywidgets", []) == Check("ipywidgets", "7.7.1")


def test_an_old_torchao_is_trouble_and_why_no_lora_can_be_made(monkeypatch):
    def refuse(*_):
        raise ImportError("Found an incompatible version of torchao.\n  Found version 0.10.0")
    monkeypatch.setattr(checkup, "bad_torchao", lambda: "0.10.0 is too old for peft")
    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    for told in (checkup._torchao(), checkup._lora()):
        assert told.verdict == "trouble" and told.mend == "pip uninstall -y torchao" and "\n" not in told.found


@pytest.mark.parametrize("free, verdict", [(0.5, "trouble"), (3, "warning"), (30, "ok")])
def test_a_full_disk_is_told_before_a_model_is_fetched(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not/there/yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free * 1e9))
    assert checkup._disk().verdict == verdict and bool(checkup._disk().mend) == (verdict != "ok")


class Gpu:
    """A torch with a GPU of some memory, on which sums work and convolutions fail in some types."""

    float16, float32, __version__ = torch.float16, torch.float32, "2.11.0"

    def __init__(self, gigabytes, count=1, fails=(), why=""):
        self.cuda = types.SimpleNamespace(
            is_available=lambda: True, get_device_name=lambda: "Tesla T4", device_count=lambda: count,
            get_device_properties=lambda number: types.SimpleNamespace(total_memory=gigabytes * 1e9),
            mem_get_info=lambda: (gigabytes * 9e8, gigabytes * 1e9))
        self.nn, self.fails, self.why = types.SimpleNamespace(functional=self), fails, why

    def ones(self, shape, *, device, dtype):
        return torch.ones(shape, dtype=dtype)

    def conv2d(self, pictures, weights, padding):
        if pictures.dtype in self.fails:
            raise RuntimeError(self.why)
        return torch.nn.functional.conv2d(pictures.float(), weights.float(), padding=padding)


@pytest.mark.parametrize("gpu, told", [
    (Gpu(16), Check("GPU", "Tesla T4, 16 GB, 14 free")), (Gpu(16, 2), Check("GPU", "2 × Tesla T4, 16 GB, 14 free")),
    (Gpu(4), Check("GPU", "Tesla T4, 4 GB, 4 free", "warning", "lb.load_pipeline(low_memory=True)"))])
def test_a_gpu_is_told_with_its_memory(monkeypatch, gpu, told):
    monkeypatch.setitem(sys.modules, "torch", gpu)
    assert checkup._gpu() == told


@pytest.mark.parametrize("fails, why", [
    ((torch.float16, torch.float32), "CUDA error: no kernel image is available for execution on the device"),
    ((torch.float16,), "GET was unable to find an engine to execute this computation"),
    ((torch.float32,), "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH")])
@pytest.mark.parametrize("sign, mend", [("KAGGLE_KERNEL_RUN_TYPE", "T4 x2"), ("NOWHERE", "whl/cu126")])
def test_a_gpu_that_cannot_do_a_convolution_is_trouble(monkeypatch, fails, why, sign, mend):
    monkeypatch.setitem(sys.modules, "torch", Gpu(16, fails=fails, why=why))
    monkeypatch.setenv(sign, "Batch")
    told = checkup._gpu()
    assert told.verdict == "trouble" and mend in told.mend and why in told.found
    assert f"Tesla T4 cannot do a convolution in {str(fails[0])[6:]} with torch 2.11.0" in told.found


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told = checkup._token()
    assert told == Check("Hub token", "there, not shown") and TOKEN not in str(Checkup([told]).as_dict())


def test_a_refused_secret_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert checkup._token().mend == "hf auth login"
    monkeypatch.setattr(checkup, "secret", lambda name: (None, f"this notebook may not read the secret {name}"))
    assert "(this notebook may not read the secret HF_TOKEN)" in checkup._token().found


def test_a_look_that_fails_is_a_line_too():
    told = checkup._safely("disk", lambda: 1 / 0)
    assert told == Check("disk", "could not be looked at: ZeroDivisionError: division by zero", "warning")


def test_an_older_python_is_all_that_is_told(monkeypatch):
    monkeypatch.setattr(checkup, "_PYTHON", (99, 1))
    assert [check.name for check in doctor()] == ["Python"] and "python99.1" in doctor()[0].mend
