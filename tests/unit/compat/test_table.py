"""The alias is a second name, never a second copy: same modules, same classes, one place to patch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.compat.names import MEMBERS, PACKAGE, Name
from zeropipe.compat.absent import AbsentError
from zeropipe.compat.table import ABSENT, BESIDE, MODULES, NAMES

ROOT = Path(__file__).resolve().parents[3]


def resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@pytest.mark.parametrize("name", PACKAGE, ids=lambda name: name.name)
def test_a_name_is_the_same_object(deepspeed: ModuleType, name: Name) -> None:
    ours = resolve(name.same)
    found: Any = deepspeed
    for part in name.name.split("."):  # as attributes, without importing anything but deepspeed
        found = getattr(found, part)
    assert found is ours
    path, _, last = f"deepspeed.{name.name}".rpartition(".")
    if path != "deepspeed.zero" and path != "deepspeed":
        assert getattr(importlib.import_module(path), last) is ours  # as an import


OF_THE_DISTRIBUTION = ("__version__", "launcher.runner.DEEPSPEED_ENVIRONMENT_NAME")


@pytest.mark.parametrize(
    "name", [n for n in PACKAGE if n.name not in OF_THE_DISTRIBUTION], ids=lambda name: name.name
)
def test_import_zeropipe_as_deepspeed_has_it_too(name: Name) -> None:
    found: Any = importlib.import_module("zeropipe")
    for part in name.name.split("."):
        found = getattr(found, part)
    assert found is resolve(name.same)


@pytest.mark.parametrize("name", [*PACKAGE, *MEMBERS], ids=lambda name: name.name)
def test_each_name_has_a_test_of_its_meaning(name: Name) -> None:
    file, _, test = name.shown.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert name.by and name.use


@pytest.mark.parametrize("path", MODULES)
def test_a_module_is_zeropipes_own_and_keeps_its_name(deepspeed: ModuleType, path: str) -> None:
    ours = importlib.import_module(MODULES[path])
    package = getattr(ours, "__path__", None)
    found = importlib.import_module(f"deepspeed.{path}")
    assert found is ours
    assert ours.__name__ == MODULES[path]
    assert ours.__spec__ is not None and ours.__spec__.name == MODULES[path]
    assert getattr(ours, "__path__", None) is package


def test_an_alias_hides_nothing_of_zeropipe() -> None:
    """Importing deepspeed.a.b sets the attribute b of what deepspeed.a is; that must not replace another b."""
    for path, target in MODULES.items():
        parent, _, name = path.rpartition(".")
        if parent in MODULES:
            there = getattr(importlib.import_module(MODULES[parent]), name, None)
            assert there is None or there is importlib.import_module(target), path


def test_parents_of_every_module_exist() -> None:
    for path in (*MODULES, *NAMES):
        parent = path.rpartition(".")[0]
        assert parent in MODULES or parent in NAMES, path
        assert path not in MODULES or path not in NAMES, path
        assert path not in ABSENT, path
        # What is imported below a module must have a package to be in.
        assert parent not in MODULES or hasattr(importlib.import_module(MODULES[parent]), "__path__"), path


def test_the_names_of_every_table_exist(deepspeed: ModuleType) -> None:
    for path, names in NAMES.items():
        module = importlib.import_module(f"deepspeed.{path}" if path else "deepspeed")
        for name, target in names.items():
            assert getattr(module, name) is resolve(target)
            assert name in dir(module)
    assert {"zero", "comm", "ops", "runtime"} <= set(dir(deepspeed))


def test_a_patch_through_the_alias_is_seen_by_zeropipe(deepspeed: ModuleType, monkeypatch) -> None:
    import zeropipe.runtime.zero.partition_parameters as ours

    alias = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    mark = object()
    monkeypatch.setattr(alias, "zero_wrapper_for_fp_tensor_constructor", mark)
    assert ours.zero_wrapper_for_fp_tensor_constructor is mark


def test_pickles_and_isinstance_agree(deepspeed: ModuleType) -> None:
    from zeropipe.runtime.lr_schedules import WarmupLR
    from zeropipe.runtime.zero.param import ZeroParamStatus

    alias = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    assert isinstance(ZeroParamStatus.AVAILABLE, alias)
    assert pickle.loads(pickle.dumps(alias.INFLIGHT)) is ZeroParamStatus.INFLIGHT
    by_name = b"cdeepspeed.runtime.zero.partition_parameters\nZeroParamStatus\n(I1\ntR."
    assert pickle.loads(by_name) is ZeroParamStatus.AVAILABLE
    assert pickle.loads(b"cdeepspeed.runtime.lr_schedules\nWarmupLR\n.") is WarmupLR
    assert b"deepspeed" not in pickle.dumps(alias.INFLIGHT)  # read back without the alias, too


def named(path: str) -> Any:
    """What ``deepspeed.<path>`` is to a script: a name of its parent."""
    parent, _, name = f"deepspeed.{path}".rpartition(".")
    space: dict[str, Any] = {}
    exec(f"from {parent} import {name}", space)
    return space[name]


@pytest.mark.parametrize("path", ABSENT)
def test_what_is_not_offered_may_be_imported_and_says_so_when_used(deepspeed: ModuleType, path: str) -> None:
    says = rf"^deepspeed\.{path}.* is not part of zeropipe.*Fix: "
    whole = named(path)
    below = [] if path.rpartition(".")[0] in MODULES else [named(f"{path}.Anything")]
    for found in (whole, *below):
        with pytest.raises(AbsentError, match=says):
            found(1, two=2)
        with pytest.raises(AbsentError, match=says):
            found.word  # noqa: B018
        with pytest.raises(AbsentError, match=says):
            list(found)
        assert not hasattr(found, "word")
        assert not isinstance(1, found)


@pytest.mark.parametrize(
    "asks",
    [
        "from deepspeed.sequence.fpdt_layer import FPDT_Attention as A; A.apply()",
        "import deepspeed; deepspeed.tp_model_init(model=None, tp_size=2)",  # tensor-parallel injection
        "import deepspeed; deepspeed.init_inference(None)",
        "import deepspeed.moe.layer; deepspeed.moe.layer.MoE(16, None)",
        "from deepspeed.moe import layer; layer.MoE(16, None)",
        "from deepspeed.autotuning import Autotuner; Autotuner()",
        "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()",
        "import deepspeed.nothing_like_it",
        "from deepspeed.runtime.utils import nothing_like_it",
        "from deepspeed.runtime import nothing_like_it",
        "import deepspeed; deepspeed.runtime.engine.nothing_like_it",
    ],
)
def test_asking_for_what_stays_out_is_a_clear_error(deepspeed: ModuleType, asks: str) -> None:
    with pytest.raises((ImportError, AttributeError), match=r"deepspeed\.[\w.]+ is not part of zeropipe"):
        exec(asks)


@pytest.mark.parametrize(
    "path", ["comm", "comm.comm", "runtime.zero", "zero", "checkpointing", "utils", "ops.adam"]
)
def test_a_missing_name_has_the_words_of_a_missing_module_and_the_path_that_was_written(
    deepspeed: ModuleType, path: str
) -> None:
    """Whichever path of the same module was imported before."""
    for other in ("comm.comm", "runtime.activation_checkpointing.checkpointing", "runtime.zero", "zero"):
        importlib.import_module(f"deepspeed.{other}")
    with pytest.raises(ImportError) as module:
        exec("import deepspeed.nothing_like_it")
    words = str(module.value)
    assert words.startswith("deepspeed.nothing_like_it is not part of zeropipe") and "Fix: " in words
    with pytest.raises(ImportError) as name:
        exec(f"import deepspeed.{path}\nimport json\nfrom deepspeed.{path} import nothing_like_it")
    assert str(name.value) == words.replace("deepspeed.nothing", f"deepspeed.{path}.nothing")
    with pytest.raises(
        AttributeError, match=r"^deepspeed\.[\w.]+\.nothing_like_it is not part of zeropipe.*Fix: "
    ):
        importlib.import_module(f"deepspeed.{path}").nothing_like_it  # noqa: B018


def test_a_class_may_inherit_from_what_stays_out(deepspeed: ModuleType) -> None:
    """Scripts define such a class at their top and make one only where an option asks for it."""
    from deepspeed.moe.layer import MoE  # type: ignore[import-not-found]

    class Mine(MoE):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x

    with pytest.raises(AbsentError, match=r"^deepspeed\.moe\.layer\.MoE is not part of zeropipe"):
        Mine()


def test_a_try_around_an_import_works_as_ever(deepspeed: ModuleType) -> None:
    """For what nobody declared; what is declared to stay out is there, to be told about when it is used."""
    try:
        import deepspeed.something_of_next_year  # type: ignore[import-not-found]
    except ImportError:
        found = None
    else:
        found = deepspeed.something_of_next_year
    assert found is None
    assert "deepspeed.something_of_next_year" not in sys.modules


def test_what_only_deepspeed_users_look_for_stands_beside_our_own_names(deepspeed: ModuleType) -> None:
    """In the same module object, so that a patch of either is seen by both."""
    for path, names in BESIDE.items():
        module = importlib.import_module(f"deepspeed.{path}")
        assert module is importlib.import_module(MODULES[path])
        for name, target in names.items():
            assert name not in vars(module), f"{path}.{name} is our own"
            assert getattr(module, name) is resolve(target)


def test_without_the_alias_our_modules_answer_as_before(deepspeed: ModuleType, monkeypatch) -> None:
    import zeropipe.runtime.utils as plain
    import zeropipe.utils as lazy

    assert importlib.import_module("deepspeed.runtime.utils").inf > 0
    assert importlib.import_module("deepspeed.utils").is_initialized() in (True, False)
    monkeypatch.delitem(sys.modules, "deepspeed")
    for module in (plain, lazy):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_code_of_a_module_is_found_for_python_m(deepspeed: ModuleType) -> None:
    spec = importlib.util.find_spec("deepspeed.launcher.runner")
    assert spec is not None and spec.loader is not None
    code = spec.loader.get_code("deepspeed.launcher.runner")  # type: ignore[attr-defined]
    assert code.co_filename.endswith("compat/runner.py")
