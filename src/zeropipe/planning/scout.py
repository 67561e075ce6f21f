"""What the stages of a pipeline hand to each other, found without the ranks that have them."""

from __future__ import annotations

import torch

from zeropipe.given import Tree
from zeropipe.runtime.pipe.instructions import Op
from zeropipe.runtime.pipe.layers import bind, build, key_of
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.wire import Form, Value, flatten, rebuild

Forms = dict[tuple[int, int, Op], Form]


def forms(module: PipelineModule, inputs: Tree) -> Forms:
    """Of every edge between two stages. Each layer is built, run and dropped: the model is never here as a whole."""
    found = Forms()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tied: dict[str, torch.nn.Module | None] = {}
    value = inputs
    for stage in range(module.total_stages - 1):
        for number in module.layers_of(stage):
            layer = module.layer_list()[number]
            key = key_of(layer)
            built = tied[key] if key in tied else build(layer)
            if built is not None:
                built.to(dtype)
            if key is not None:
                tied[key] = built
            value = bind(layer, built)(value)
        made = flatten(value, f"the output of stage {stage}")
        found[stage, stage + 1, Op.FORWARD] = Form.of(made)
        wanted = [tensor for tensor, flag in zip(made.tensors, made.wanted, strict=True) if flag]
        found[stage + 1, stage, Op.BACKWARD] = Form.of(Value("", wanted, [False] * len(wanted)))
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in made.tensors]
        value = rebuild(made.tree, leaves)
    return found
