"""Names for "a partition of any stage" and "its gradients", so that the rest need not tell stages apart."""

from __future__ import annotations

from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.sharded_grads import ShardedGradStore
from zeropipe.runtime.zero.hold.sharded_partition import ShardedPartition

AnyPartition = Partition | ShardedPartition
AnyStore = GradStore | ShardedGradStore
