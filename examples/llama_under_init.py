"""A Llama-shaped model of Hugging Face's transformers, built in shards under zero.Init and trained at ZeRO stage 3.

    pip install transformers
    torchrun --nproc-per-node 2 examples/llama_under_init.py
    torchrun --nproc-per-node 2 examples/llama_under_init.py --hidden 1536 --layers 12 --steps 1  # 300 M parameters

No rank ever holds the whole model: each module is cut into shards as soon as its constructor returns, gathered when
it runs, and freed after. `zero.unsharded` makes it whole for a while, here to generate.
"""

import argparse
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import zeropipe

CONTEXT, MICRO_BATCH = 128, 4


def main() -> None:
    args = arguments()
    from transformers import LlamaConfig, LlamaForCausalLM

    zeropipe.init_distributed()
    rank, ranks = zeropipe.comm.get_rank(), zeropipe.comm.get_world_size()
    shape = LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": 3},
    }
    torch.manual_seed(0)
    before = peak_memory()
    with zeropipe.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(shape)
    parameters = sum(p.ds_numel for p in model.parameters())
    if rank == 0:
        print(
            f"{parameters:,} parameters on {ranks} ranks; building it took {(peak_memory() - before) / 1e6:.0f} MB "
            f"on rank 0, the whole model has {parameters * (2 if args.bf16 else 4) / 1e6:.0f} MB"
        )
    engine, *_ = zeropipe.initialize(model=model, config=config)
    for step, tokens in zip(range(1, args.steps + 1), batches(rank, ranks), strict=False):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step}: {loss.item() / 0.6931:.2f} bits per byte")
    with zeropipe.zero.unsharded(engine.module):
        prompt = torch.tensor([list(b"def ")])
        text = engine.module.generate(prompt, max_new_tokens=80, do_sample=False, pad_token_id=0)
    if rank == 0:
        print(bytes(text[0].tolist()).decode(errors="replace"))


def batches(rank: int, ranks: int) -> Iterator[Tensor]:
    """Tokens [batch, time] from the source of Python's standard library, others on each rank."""
    folder = Path(argparse.__file__).parent
    text = torch.tensor(list(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])))
    chosen = torch.Generator().manual_seed(rank + 1000 * ranks)
    while True:
        starts = torch.randint(len(text) - CONTEXT, (MICRO_BATCH,), generator=chosen)
        yield torch.stack([text[start : start + CONTEXT] for start in starts])


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
