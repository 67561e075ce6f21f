"""zeropipe under the name ``deepspeed``. Nothing is defined here: ``zeropipe.compat`` fills this module."""

from zeropipe.compat import install_as_deepspeed

__zeropipe_shim__ = True
install_as_deepspeed()
