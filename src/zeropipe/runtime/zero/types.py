"""Names for "a partition of any stage" and "its gradients", so that the rest need not tell stages apart."""

from __future__ import annotations

from zeropipe.runtime.zero.grads import GradStore
from zeropipe.runtime.zero.partition import Partition
from zeropipe.runtime.zero.sharded_grads import ShardedGradStore
from zeropipe.runtime.zero.sharded_partition import ShardedPartition

AnyPartition = Partition | ShardedPartition
AnyStore = GradStore | ShardedGradStore
