"""Train the byte-level GPT of this folder as a pipeline, and go on from its checkpoint without one.

    torchrun --nproc-per-node 2 examples/train_pipeline.py                        # two stages, 1F1B
    torchrun --nproc-per-node 4 examples/train_pipeline.py --stages 2 --zero 2    # two stages x two replicas
    torchrun --nproc-per-node 2 examples/train_pipeline.py --schedule zbv --picture run.png
    torchrun --nproc-per-node 1 examples/train_pipeline.py --plain --steps 120    # the same run, now a plain model

Every command goes on from where the one before stopped, whatever its stages, replicas and ZeRO stage.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeropipe
from gpt import BYTES, GPT, Block, GPTConfig, RMSNorm
from support.text import Text, read_text
from zeropipe.pipe import LayerSpec, PipelineModule

MODEL = GPTConfig()
ROWS, MICRO_BATCHES = 4, 8  # a batch is 8 micro-batches of 4 windows, shared out over the replicas


class Enter(nn.Module):
    """Bytes [batch, time] to activations [batch, time, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, MODEL.width)
        nn.init.normal_(self.byte.weight, std=MODEL.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.byte(x)


class Layer(Block):
    """A block that takes activations alone, as the layers of a pipeline hand them on."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h, angles(h))


class Leave(nn.Module):
    """Activations to logits [batch, time, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(MODEL.width), nn.Linear(MODEL.width, BYTES, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.norm(h)).float()


def angles(h: Tensor) -> Tensor:
    """The rotary angles of `GPT`, which every block computes for itself."""
    holder = argparse.Namespace(config=MODEL)
    return GPT.angles(holder, h.shape[1], h.device)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def layers() -> list[LayerSpec]:
    return [LayerSpec(Enter), *[LayerSpec(Layer) for _ in range(MODEL.layers)], LayerSpec(Leave)]


def micro_batches(text: Text, step: int, replica: int, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The replica's part of the step's 8 micro-batches."""
    for micro in range(replica, MICRO_BATCHES, replicas):
        yield text.batch(step, micro, 0, ROWS, MODEL.context)


def main() -> None:
    args = arguments()
    zeropipe.init_distributed()
    rank, world = zeropipe.comm.get_rank(), zeropipe.comm.get_world_size()
    stages = 1 if args.plain else args.stages or world
    replicas = world // stages
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES // replicas,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {"stage": args.zero},
    }
    text = read_text(args.text, MODEL.context)
    if args.plain:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*(layer.build() for layer in layers()))
    else:
        model = PipelineModule(
            layers(), num_stages=stages, loss_fn=loss_of, seed_layers=True, schedule=args.schedule
        )
    engine, *_ = zeropipe.initialize(model=model, config=config)
    engine.load_checkpoint(args.folder)  # finds nothing in a new run
    replica = rank if args.plain else engine.grid.get_data_parallel_rank()
    for step in range(engine.global_steps, args.steps):
        data = micro_batches(text, step, replica, replicas)
        if args.plain:
            loss = torch.zeros(())
            for x, y in data:
                one = loss_of(engine(x.to(engine.device)), y.to(engine.device))
                engine.backward(one)
                engine.step()
                loss += one.detach().cpu() * replicas / MICRO_BATCHES
        else:
            loss = engine.train_batch(data)
        if rank == 0:
            print(f"step {step + 1:4d}  {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    engine.save_checkpoint(args.folder)
    if args.picture and not args.plain:
        engine.pipeline_timeline(args.picture)
    engine.destroy()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, help="pipeline ranks; default: all processes")
    parser.add_argument("--schedule", default="1f1b", help="see `zeropipe pipe plan --help`")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--plain", action="store_true", help="no pipeline: the same layers, a plain module")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--text", type=Path, help="a file or folder; default: the standard library's source")
    parser.add_argument("--folder", type=Path, default=Path("runs/pipeline"), help="checkpoints")
    parser.add_argument("--picture", type=Path, help="draw the last step: PNG, SVG, or JSON for a browser")
    return parser.parse_args()


if __name__ == "__main__":
    main()
