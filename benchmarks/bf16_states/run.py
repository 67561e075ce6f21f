"""Does training in bf16 suffer from moments and masters in bf16? A small GPT on a random language, several seeds.

    python -m benchmarks.bf16_states.run [--steps 300] [--seeds 3]

Contenders: bf16 with fp32 masters and moments; moments, masters, or both in bf16 with stochastic rounding; and plain
PyTorch with everything in bf16, which rounds to the nearest. To hold: what is rounded stochastically ends within the
spread of the seeds of the first, and what is rounded to the nearest above it. Bytes are those of masters that are
copies, and moments, per parameter.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import zeropipe
from benchmarks.common.report import write

WORDS, WIDTH, HEADS, LENGTH, BATCH, LR = 64, 64, 4, 32, 16, 1e-3
MASTERS, MOMENTS = "bf16_master_weights_and_grads", "bf16_optimizer_states"
CONTENDERS = {
    "fp32 masters and moments": (),
    "moments in bf16": (MOMENTS,),
    "masters in bf16": (MASTERS,),
    "both in bf16": (MASTERS, MOMENTS),
    "plain PyTorch, all bf16 to the nearest": None,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.wide(self.after(x))


class GPT(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids[:, :-1]) + self.places(torch.arange(LENGTH))
        found = self.head(self.norm(self.blocks(x))).float()
        return nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten())


def text(number: int, table: torch.Tensor) -> torch.Tensor:
    """``[BATCH, LENGTH + 1]``: each word by chance, after the one before it."""
    random = torch.Generator().manual_seed(1000 + number)
    words = [torch.randint(0, WORDS, (BATCH,), generator=random)]
    for _ in range(LENGTH):
        words.append(torch.multinomial(table[words[-1]], 1, generator=random)[:, 0])
    return torch.stack(words, 1)


def train(
    keys: tuple[str, ...] | None, seed: int, data: list[torch.Tensor], held_out: list[torch.Tensor]
) -> tuple[float, float]:
    """(the loss on held-out text, bytes of masters and moments per parameter)."""
    model = GPT(seed)
    numel = sum(p.numel() for p in model.parameters())
    if keys is None:
        model = model.bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        for ids in data:
            model(ids).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        state = 4.0 * numel
    else:
        settings = {
            "train_batch_size": BATCH,
            "bf16": {"enabled": True, **dict.fromkeys(keys, True)},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
            "zero_optimization": {"stage": 1},
        }
        engine, *_ = zeropipe.initialize(model=model, config=settings)
        for ids in data:
            engine.backward(engine(ids))
            engine.step()
        state = float(engine.memory_report()[2].bytes)
        engine.destroy()
    with torch.no_grad():
        return mean(float(model(ids)) for ids in held_out), state / numel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = torch.softmax(torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(1)) * 3, -1)
    data = [text(step, table) for step in range(args.steps)]
    held_out = [text(10_000 + number, table) for number in range(8)]
    found = {
        name: [train(keys, seed, data, held_out) for seed in range(args.seeds)]
        for name, keys in CONTENDERS.items()
    }
    first = [loss for loss, _ in next(iter(found.values()))]
    lines = [
        "| contender | masters and moments, bytes a parameter | held-out loss, by seed | above the first, mean |",
        "|---|---:|---|---:|",
    ]
    for name, runs in found.items():
        losses = [loss for loss, _ in runs]
        above = mean(a - b for a, b in zip(losses, first, strict=True))
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {name} | {runs[0][1]:.1f} | {shown} | {above:+.4f} |")
    title = f"Moments and masters in bf16: {args.steps} steps of a GPT of two blocks"
    write(Path(__file__).parent, title, "\n".join(lines), {"found": found})


if __name__ == "__main__":
    main()
