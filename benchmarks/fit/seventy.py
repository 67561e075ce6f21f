"""A Llama of 70 B as a pipeline, to be planned, not run:

zeropipe plan --world 1024 --device h200 benchmarks/fit/seventy.py [--width 8192 --layers 80 --stages 8]
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import zeropipe
from zeropipe.pipe import LayerSpec, PipelineModule

HEAD, KEYS = 128, 8  # of a head; heads of keys and values


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * 7 // 2
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, KEYS * HEAD, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("width", 8192), ("layers", 80), ("stages", 8), ("seq", 4096), ("micro-batches", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    layers = [
        LayerSpec(nn.Embedding, 32000, args.width),
        *(LayerSpec(Layer, args.width) for _ in range(args.layers)),
        LayerSpec(nn.RMSNorm, args.width),
        LayerSpec(nn.Linear, args.width, 32000, bias=False),
    ]
    module = PipelineModule(
        layers,
        num_stages=args.stages,
        loss_fn=loss,
        partition_method="parameters",
        activation_checkpoint_interval=1,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.micro_batches,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    engine, *_ = zeropipe.initialize(model=module, config=config)
    while True:
        tokens = torch.randint(0, 32000, (1, args.seq))
        engine.train_batch(iter([(tokens, tokens)] * args.micro_batches))


if __name__ == "__main__":
    main()
