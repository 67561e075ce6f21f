"""The import paths that users know, and that asking for a name loads no more than it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zeropipe
from zeropipe.runtime import zero
from zeropipe.runtime.zero import partition_parameters

NAMES = [
    "Init",
    "GatheredParameters",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "unregister_external_parameter",
    "unsharded",
    "unshard",
    "reshard",
    "unshard_module",
    "describe",
    "TiledLinear",
    "TiledLinearReturnBias",
    "MiCS_Init",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_package(name):
    assert callable(getattr(zeropipe.zero, name))
    assert name in dir(zero)


def test_modules_of_the_package_do_not_hide_its_names():
    import zeropipe.runtime.zero.description
    import zeropipe.runtime.zero.gather.sharded_model  # noqa: F401

    assert callable(zero.describe) and callable(zero.unshard)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        zero.nonsense  # noqa: B018


def test_partition_parameters_has_the_same_objects():
    for name in (
        "Init",
        "GatheredParameters",
        "ZeroParamStatus",
        "ZeroParamType",
        "register_external_parameter",
    ):
        assert getattr(partition_parameters, name) is getattr(zero, name)
    assert callable(partition_parameters.zero_wrapper_for_fp_tensor_constructor)
    assert [s.name for s in zero.ZeroParamStatus] == ["AVAILABLE", "NOT_AVAILABLE", "INFLIGHT"]


def test_leaf_functions_are_in_utils():
    assert callable(zeropipe.utils.set_z3_leaf_modules) and callable(zeropipe.utils.z3_leaf_module)


def test_the_package_loads_nothing_by_itself():
    code = (
        "import zeropipe.runtime.zero, sys; zeropipe.zero; "
        "assert not [m for m in sys.modules if m.startswith('zeropipe.runtime.zero.')], 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
