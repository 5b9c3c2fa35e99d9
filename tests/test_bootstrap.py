import ast
import inspect
import sys
import tomllib
import types
from pathlib import Path

import peft.import_utils
import pytest

from lorabook import bootstrap
from lorabook.bootstrap import Requirement, bad_torchao, mend, misfits, requirements, version_of

PROJECT = Path(bootstrap.__file__).parent.parent / "pyproject.toml"


class Machine:
    """Invented packages on the import path, and a pip that only writes down what it was told and
    does what it is set to.
    """

    def __init__(self, folder):
        self.folder, self.asked, self.kept, self.installs, self.status = folder, [], "", {}, 0

    def put(self, name, version, needs=(), module=None):
        self.take(name)
        info = self.folder / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = [
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        (info / "top_level.txt").write_text(f"{module or name}\n")
        bootstrap.importlib.invalidate_caches()

    def take(self, name):
        for info in self.folder.glob(f"{name}-*.dist-info"):
            for path in info.iterdir():
                path.unlink()
            info.rmdir()
        bootstrap.importlib.invalidate_caches()

    def needs(self, *lines):
        (self.folder / "pyproject.toml").write_text(f"[project]\ndependencies = {list(lines)!r}\n")

    def pip(self, *arguments):
        self.asked.append(arguments)
        if arguments[0] == "uninstall":
            return self.take(arguments[-1])
        self.kept = Path(arguments[arguments.index("-c") + 1]).read_text()
        for name, version in self.installs.items():
            self.put(name, version)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "_pip", machine.pip)
    monkeypatch.setenv("PYTHONPATH", "there")
    machine.needs("torch>=2.6", "numpy>=1.26", "inkwell>=2")
    machine.put("inkwell", "2.1")
    return machine


def test_it_runs_before_anything_is_installed():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(Path(bootstrap.__file__).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {*sys.stdlib_module_names, "packaging", "pip"}


def test_what_is_needed_stands_in_pyproject_alone():
    told = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    assert [str(need) for need in requirements()] == told and len(told) > 10


def test_an_installed_package_without_its_repository_knows_its_needs_too(machine):
    (machine.folder / "pyproject.toml").unlink()
    machine.put(
        "lorabook",
        "9.9",
        ["inkwell>=2", "nbval>=0.11; extra == 'dev'", "winkwell; sys_platform == 'dos'"],
    )
    assert [str(need) for need in requirements()] == ["inkwell>=2"]


def test_the_floor_of_torchao_is_that_of_peft():
    assert f'"{bootstrap.TORCHAO_FLOOR}"' in inspect.getsource(
        peft.import_utils.is_torchao_available
    )


def test_what_is_installed_here_fits():
    assert not [misfit for need in requirements() for misfit in misfits(need)]


@pytest.mark.parametrize(
    "version, said", [("1.9", "and there is 1.9"), (None, "and it is not there")]
)
def test_an_old_and_a_missing_package_are_told_apart(machine, version, said):
    machine.put("inkwell", version) if version else machine.take("inkwell")
    assert [str(misfit) for misfit in misfits(Requirement("inkwell>=2"))] == [
        f"lorabook needs inkwell>=2 {said}"
    ]


def test_packages_that_do_not_suit_each_other_are_found(machine):
    machine.put(
        "inkwell", "2.1", ["quill<3", "blotter; extra == 'dry'", "winkwell; sys_platform == 'dos'"]
    )
    machine.put("quill", "3.0")
    assert [str(misfit) for misfit in misfits(Requirement("inkwell"))] == [
        "inkwell needs quill<3 and there is 3.0"
    ]


def test_a_build_for_one_machine_counts_as_its_version(machine):
    machine.put("inkwell", "2.13.0+cpu")
    assert not misfits(Requirement("inkwell>=2.13"))


def test_where_all_is_well_nothing_happens(machine, capsys):
    mend()
    assert not machine.asked and capsys.readouterr().out == ""


def test_a_wrong_package_is_installed_beside_the_torch_and_numpy_that_are_there(machine, capsys):
    machine.put("inkwell", "1.0")
    machine.installs = {"inkwell": "2.2", "quill": "1.0"}
    mend()
    assert len(machine.asked) == 1 and machine.asked[0][3:] == ("inkwell>=2",)
    assert machine.kept == f"torch=={version_of('torch')}\nnumpy=={version_of('numpy')}\n"
    assert capsys.readouterr().out == "lorabook: installed inkwell 2.2 and 1 more\n"


def test_torch_and_numpy_stay_even_where_their_own_needs_are_not_met(machine):
    machine.put("torch", "2.13.0", ["quill"])
    mend()
    assert not machine.asked


TORCHAO = {"__init__": "", "utils": "", "quantization": ""}


def put_torchao(machine, version, **modules):
    machine.put("torchao", version)
    (machine.folder / "torchao").mkdir()
    for name, code in (TORCHAO | modules).items():
        (machine.folder / f"torchao/{name}.py").write_text(code)


@pytest.mark.parametrize("version, gone", [("0.10.0", True), ("0.16.0", False)])
def test_only_a_torchao_that_peft_refuses_is_removed(machine, version, gone, capsys):
    put_torchao(machine, version)
    mend()
    assert (
        machine.asked == [("uninstall", "-y", "torchao")] * gone
        and (version_of("torchao") is None) == gone
    )
    assert (
        capsys.readouterr().out == "lorabook: removed torchao 0.10.0\n" * gone
        and bad_torchao() is None
    )


@pytest.mark.parametrize(
    "modules",
    [
        {"__init__": "raise OSError('_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')"},
        {"__init__": "raise RuntimeError('operator torchao::x does not exist')"},
        {"__init__": "raise AttributeError('module torch has no attribute x')"},
        {"utils": "from os import no_such_thing"},
        {"quantization": "raise ImportError('built for another torch')"},
        {"__init__": "import os; os.abort()"},
    ],
)
def test_a_new_torchao_that_does_not_import_is_removed(machine, modules, capsys):
    put_torchao(machine, "0.17.0", **modules)
    assert bad_torchao().startswith("0.17.0 cannot be imported, so peft makes no LoRA beside it: ")
    mend()
    assert machine.asked == [("uninstall", "-y", "torchao")] and bad_torchao() is None
    assert capsys.readouterr().out == "lorabook: removed torchao 0.17.0\n"


def test_a_torch_that_is_too_old_ends_it_before_anything_is_changed(machine):
    machine.needs("torch>=99", "inkwell>=3")
    with pytest.raises(
        RuntimeError, match=r"needs torch>=99 and there is .* choose a newer runtime"
    ):
        mend()
    assert not machine.asked


def test_the_kernel_restarts_where_a_replaced_package_was_loaded(machine, monkeypatch):
    machine.put("inkwell", "1.0", module="inks")
    machine.installs = {"inkwell": "2.2"}
    monkeypatch.setitem(sys.modules, "inks", types.ModuleType("inks"))
    restarts = []
    kernel = types.SimpleNamespace(do_shutdown=lambda restart: restarts.append(restart))
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    with pytest.raises(
        SystemExit,
        match="installed inkwell 2.2; inkwell had been loaded before, so the kernel restarts",
    ):
        mend()
    assert restarts == [True]


def test_a_pip_that_leaves_something_wrong_is_told(machine):
    machine.put("inkwell", "1.0")
    with pytest.raises(
        RuntimeError, match=r"but lorabook needs inkwell>=2 and there is 1.0; restart the kernel"
    ):
        mend()


def test_a_pip_that_fails_is_told_in_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="pip install failed: .*Kaggle") as caught:
        bootstrap._pip("install", "--no-index", str(tmp_path / "nothing.whl"))
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


def test_commands_that_a_notebook_starts_find_the_package(machine, monkeypatch):
    monkeypatch.setattr(
        bootstrap, "version_of", lambda name: None if name == "lorabook" else version_of(name)
    )
    mend()
    mend()
    assert bootstrap.os.environ["PYTHONPATH"].split(bootstrap.os.pathsep) == [
        str(machine.folder),
        "there",
    ]
