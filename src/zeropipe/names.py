"""The one table of names that are found where they are not defined, so that packages stay cheap to import.

A package that answers for such names says ``__getattr__, __dir__ = lazy(__name__)``. A name is looked up when it is
asked for. The modules of a package are attributes of it too, without an
import statement: users write ``zeropipe.runtime.lr_schedules.WarmupLR``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

_LEAF = ("set_z3_leaf_modules", "set_z3_leaf_modules_by_name", "set_z3_leaf_modules_by_suffix",
         "unset_z3_leaf_modules", "set_z3_leaf_module", "get_z3_leaf_modules",
         "z3_leaf_module", "z3_leaf_parameter")  # fmt: skip
_ACCESS = tuple(
    f"safe_{verb}_{extent}_{what}"
    for verb in ("get", "set")
    for extent in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
)

# Where users look -> where it is defined -> the names; "" is the module itself under its last name.
NAMES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "zeropipe": {
            "zeropipe.accelerator": ("get_accelerator",),
            "zeropipe.comm.group": ("init_distributed",),
            "zeropipe.compat.configuration": ("DeepSpeedConfig",),
            "zeropipe.entry": ("initialize", "add_config_arguments"),
            "zeropipe.planning.fitting.fit": ("fit", "Fit"),
            "zeropipe.planning.plan": ("plan", "Plan"),
            "zeropipe.runtime.base_optimizer": ("DeepSpeedOptimizer",),
            "zeropipe.runtime.engine": ("DeepSpeedEngine",),
            "zeropipe.runtime.lr_schedules": ("add_tuning_arguments",),
            "zeropipe.runtime.pipe.engine": ("PipelineEngine",),
            "zeropipe.runtime.pipe.module": ("PipelineModule",),
            "zeropipe.runtime.resilience.loop": ("run", "Run"),
            "zeropipe.runtime.zero": ("",),
            "zeropipe.utils.init_on_device": ("OnDevice",),
            "zeropipe.utils.logging": ("log_dist", "logger"),
        },
        "zeropipe.checkpoint": {
            "zeropipe.checkpoint.deepspeed_checkpoint": ("DeepSpeedCheckpoint",),
            "zeropipe.checkpoint.reshape_3d_utils": ("model_3d_desc", "get_model_3d_descriptor"),
            "zeropipe.checkpoint.reshape_meg_2d": ("reshape_meg_2d_parallel", "meg_2d_parallel_map"),
            "zeropipe.checkpoint.reshape_utils": ("merge_state",),
            "zeropipe.checkpoint.universal_checkpoint": ("enable_universal_checkpoint", "SubparamShape"),
            "zeropipe.checkpoint.utils": (
                "get_layer_ckpt_name_for_rank",
                "get_model_ckpt_name_for_rank",
                "get_zero_ckpt_name_for_rank",
            ),
            "zeropipe.checkpoint.zero_checkpoint": ("ZeROCheckpoint",),
        },
        "zeropipe.comm": {
            "zeropipe.comm.log": ("log_summary",),
            "zeropipe.runtime.fp16.onebit.exchange": ("compressed_all_reduce",),
        },
        "zeropipe.ops": {},
        "zeropipe.runtime": {},
        "zeropipe.runtime.fp16": {"zeropipe.runtime.engine": ("DeepSpeedEngine",)},
        "zeropipe.runtime.optimizers.registry": {
            "zeropipe.runtime.fp16.onebit.adam": ("OnebitAdam",),
            "zeropipe.runtime.fp16.onebit.lamb": ("OnebitLamb",),
            "zeropipe.runtime.fp16.onebit.zoadam": ("ZeroOneAdam",),
        },
        "zeropipe.runtime.pipe": {
            "zeropipe.runtime.pipe.instructions": ("Schedule", "Instruction"),
            "zeropipe.runtime.pipe.module": ("PipelineModule",),
            "zeropipe.runtime.pipe.schedule": ("make_schedule",),
            "zeropipe.runtime.pipe.layers": ("LayerSpec", "TiedLayerSpec"),
            "zeropipe.runtime.pipe.topology": (
                "PipelineParallelGrid",
                "ProcessTopology",
                "PipeDataParallelTopology",
                "PipeModelDataParallelTopology",
            ),
        },
        "zeropipe.runtime.zero": {
            "zeropipe.runtime.zero.description": ("describe",),
            "zeropipe.runtime.zero.gather.whole": ("GatheredParameters",),
            "zeropipe.runtime.zero.gather.init": ("Init",),
            "zeropipe.runtime.zero.marks": (
                *_LEAF,
                "register_external_parameter",
                "unregister_external_parameter",
            ),
            "zeropipe.runtime.zero.mics": ("MiCS_Init",),
            "zeropipe.runtime.zero.partition_parameters": ("zero_wrapper_for_fp_tensor_constructor",),
            "zeropipe.runtime.zero.param": ("ZeroParamStatus", "ZeroParamType"),
            "zeropipe.runtime.zero.tiling": ("TiledLinear", "TiledLinearReturnBias"),
            "zeropipe.runtime.zero.gather.sharded_model": (
                "unsharded",
                "unshard",
                "reshard",
                "unshard_module",
            ),
        },
        "zeropipe.runtime.zero.gather.init": {"zeropipe.compat.pretrained.seam": ("stream_pretrained",)},
        "zeropipe.runtime.zero.gather.weights": {"zeropipe.compat.pretrained.seam": ("load_converted",)},
        "zeropipe.utils": {
            "zeropipe.runtime.dataloader": ("RepeatingLoader",),
            "zeropipe.runtime.zero.hold.access": (*_ACCESS, "safe_update_full_grad_vectorized"),
            "zeropipe.runtime.zero.marks": _LEAF,
            "zeropipe.utils.init_on_device": ("OnDevice",),
            "zeropipe.utils.logging": ("log_dist",),
        },
    }
)


def homes(package: str) -> dict[str, str]:
    """{name: the module that defines it} of a package; a module of another place is its own home."""
    return {
        name or module.rpartition(".")[2]: module
        for module, names in NAMES[package].items()
        for name in names
    }


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (or module) that the table has.

    Nothing is kept: what somebody exchanges in the defining module is seen under every name.
    """
    where = homes(package)

    def lookup(name: str) -> Any:
        if name in where:
            module = import_module(where[name])
            return getattr(module, name) if name in NAMES[package][where[name]] else module
        # A module of the package that nobody has imported yet; a module that is no package has none.
        has_modules = "__path__" in vars(sys.modules[package])
        if name.startswith("_") or not has_modules or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return lookup, lambda: sorted({*vars(sys.modules[package]), *where})
