"""What users call ``zeropipe.zero``: names are loaded when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeropipe.names import lazy

if TYPE_CHECKING:
    from zeropipe.runtime.zero.description import describe as describe
    from zeropipe.runtime.zero.gather.init import Init as Init
    from zeropipe.runtime.zero.gather.sharded_model import reshard as reshard
    from zeropipe.runtime.zero.gather.sharded_model import unshard as unshard
    from zeropipe.runtime.zero.gather.sharded_model import unshard_module as unshard_module
    from zeropipe.runtime.zero.gather.sharded_model import unsharded as unsharded
    from zeropipe.runtime.zero.gather.whole import GatheredParameters as GatheredParameters
    from zeropipe.runtime.zero.marks import (
        register_external_parameter as register_external_parameter,
    )
    from zeropipe.runtime.zero.marks import (
        unregister_external_parameter as unregister_external_parameter,
    )
    from zeropipe.runtime.zero.param import ZeroParamStatus as ZeroParamStatus
    from zeropipe.runtime.zero.param import ZeroParamType as ZeroParamType

__getattr__, __dir__ = lazy(__name__)
