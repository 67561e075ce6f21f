"""What users give that no type describes, by name and with the reason; an argument that is just ``Any`` is a slip.

None of these is checked by a type checker. What they are is found out where they are used, and said in the error.
"""

from __future__ import annotations

from typing import Any, TypeAlias

# Tensors in whatever containers the user's model takes and returns; torch's pytree knows them, no type does.
Tree: TypeAlias = Any
# Any object at all: it is pickled, told to other ranks, put into words or compared as it is.
Anything: TypeAlias = Any
# What JSON has: mypy's recursive types would have every reader prove again what the parser has checked.
Json: TypeAlias = Any
# argparse's namespace, a dataclass, a client's own: it is asked for attributes by name.
Namespace: TypeAlias = Any
# A torch optimizer, an object that wraps one as ``.optimizer``, or a callable that makes one of the parameters.
OptimizerLike: TypeAlias = Any
# Parameters, param-group dicts, or pairs of names and parameters: torch's own type for it has changed over versions.
ParametersLike: TypeAlias = Any
# What has ``step``: torch's schedules, ours, clients' wrappers; they share no class. Or a callable that makes one.
ScheduleLike: TypeAlias = Any
# A dataset with or without a length, or a loader of any library; ``len`` and ``state_dict`` where it has them.
DataLike: TypeAlias = Any
# A grid of ours, or Megatron's *module* of functions, whose names have changed: it is asked by name.
Mpu: TypeAlias = Any
# torch's DeviceMesh and ProcessGroup, or what looks like them: only ``comm`` names ``torch.distributed``.
Mesh: TypeAlias = Any
ProcessGroup: TypeAlias = Any
