"""Small things that users import from here; all but the logger are loaded when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeropipe.names import lazy
from zeropipe.utils.logging import logger as logger

if TYPE_CHECKING:
    from zeropipe.runtime.dataloader import RepeatingLoader as RepeatingLoader
    from zeropipe.runtime.zero.marks import get_z3_leaf_modules as get_z3_leaf_modules
    from zeropipe.runtime.zero.marks import set_z3_leaf_module as set_z3_leaf_module
    from zeropipe.runtime.zero.marks import set_z3_leaf_modules as set_z3_leaf_modules
    from zeropipe.runtime.zero.marks import unset_z3_leaf_modules as unset_z3_leaf_modules
    from zeropipe.runtime.zero.marks import z3_leaf_module as z3_leaf_module
    from zeropipe.runtime.zero.marks import z3_leaf_parameter as z3_leaf_parameter
    from zeropipe.utils.init_on_device import OnDevice as OnDevice
    from zeropipe.utils.logging import log_dist as log_dist
    from zeropipe.utils.tensor_fragment import *  # noqa: F403

__getattr__, __dir__ = lazy(__name__)
