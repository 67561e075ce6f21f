"""Optimizers that exchange one bit per element: OnebitAdam, OnebitLamb, ZeroOneAdam, and their all-reduce."""

from zeropipe.runtime.fp16.onebit.adam import OnebitAdam
from zeropipe.runtime.fp16.onebit.exchange import compressed_all_reduce, error_buffers
from zeropipe.runtime.fp16.onebit.lamb import OnebitLamb
from zeropipe.runtime.fp16.onebit.zoadam import ZeroOneAdam

__all__ = ["OnebitAdam", "OnebitLamb", "ZeroOneAdam", "compressed_all_reduce", "error_buffers"]
