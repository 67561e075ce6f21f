"""Train a small byte-level GPT on the source of the Python standard library, its state cut over the ranks.

    python examples/train_gpt.py                               # ZeRO stage 2 on two ranks; so does `make train`
    python examples/train_gpt.py --text notes/ --folder runs/notes --dtype bf16 --stage 1 --nproc 4
    python examples/train_gpt.py --config my.json              # any configuration that DeepSpeed users have

Stop it at any moment and start it again: it goes on from its last checkpoint, and ends with the same weights,
bit for bit, as if it had never been stopped. The lines marked `# <-` are all that training with zeropipe takes.
"""

import argparse
import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

import zeropipe  # <-
from gpt import GPT, GPTConfig, generate, parameter_groups
from support import launch, options, report, run_folder
from support.text import Text, read_text

CONTEXT = GPTConfig.context  # bytes that the model sees at once


def main() -> None:
    args = options.read(__doc__)
    if launch.is_rank():
        train(args)
        return
    config, text = configuration(args), read_text(args.text, CONTEXT)
    launch.check(config)
    settings = {"steps": args.steps, "ranks": args.nproc, "text": text.source, "bytes": text.digest}
    with run_folder.open_run(args.folder, settings | {"config": config}, args.fresh):
        sys.exit(launch.start_ranks(__file__, sys.argv[1:], args.nproc))


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration; `--config my.json` takes the place of all of these."""
    schedule = {"total_num_steps": args.steps, "warmup_num_steps": max(2, args.steps // 30)}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR", "params": schedule},
        "zero_optimization": {"stage": 2},
    }
    if args.config is not None:
        config = copy.deepcopy(args.config)
    if args.stage is not None:
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": args.stage}
    if args.dtype is not None:
        for name in ("bf16", "fp16"):
            config[name] = {**config.get(name, {}), "enabled": args.dtype == name}
    config.setdefault("report", {"folder": str(args.folder)})  # for `zeropipe report`
    return config


def train(args: argparse.Namespace) -> None:
    zeropipe.init_distributed()  # <-
    rank, ranks = zeropipe.comm.get_rank(), zeropipe.comm.get_world_size()
    text = read_text(args.text, CONTEXT)
    torch.manual_seed(0)  # the same weights on every rank
    model = GPT()

    groups, config = parameter_groups(model), configuration(args)
    engine, *_ = zeropipe.initialize(model=model, model_parameters=groups, config=config)  # <-
    rows, micro_steps = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()

    _, state = engine.load_checkpoint(args.folder)  # <- finds nothing in a new run
    state = state or {"history": [], "traffic": []}

    with report.Board(args.steps, state["history"], active=rank == 0) as board:
        for step in range(engine.global_steps, args.steps):
            total = torch.zeros((), device=engine.device)
            with zeropipe.comm.record() as events:
                for micro in range(micro_steps):
                    x, y = text.batch(step, micro, rank, rows, CONTEXT)
                    loss = engine(x.to(engine.device), y.to(engine.device))  # <-
                    engine.backward(loss)  # <-
                    engine.step()  # <-
                    total += loss.detach() / micro_steps

            row = {"step": step + 1, "loss": bits_per_byte(total)}
            if (step + 1) % args.measure_every == 0 or step + 1 == args.steps:
                row["held_out"] = held_out(engine, text, rank, ranks, rows)
            state["traffic"] = report.traffic(events)
            board.add(row, tokens=rows * CONTEXT * micro_steps * ranks)

            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                engine.save_checkpoint(args.folder, client_state=state)  # <-
                if rank == 0:
                    run_folder.keep_newest(args.folder)

    memory: list[Any] = [None] * ranks
    zeropipe.comm.all_gather_object(memory, engine.memory_report())
    weights = {name: tensor.cpu() for name, tensor in engine.module.state_dict().items()}
    engine.eval()
    sample = generate(engine, args.prompt.encode(), args.sample, engine.device)
    if rank == 0:
        engine.report(args.folder / "report.html")
        curve = report.loss_curve(state["history"], args.folder / "loss.png")
        page = f"Page of the run: {args.folder / 'report.html'}"
        summary = report.summary(memory, state, sample, weights, f"{curve}\n{page}")
        run_folder.finish(args.folder, summary)
        print(summary)
    zeropipe.comm.barrier()
    engine.destroy()


@torch.no_grad()
def held_out(engine: nn.Module, text: Text, rank: int, ranks: int, rows: int, batches: int = 8) -> float:
    """Bits per byte on text that is never trained on: the same windows every time, shared out over the ranks."""
    engine.eval()
    total = torch.zeros((), device=engine.device)
    for number in range(batches):
        x, y = text.held_out_batch(rank * batches + number, ranks * batches, rows, CONTEXT)
        total += engine(x.to(engine.device), y.to(engine.device)) / batches
    engine.train()
    return bits_per_byte(total)


def bits_per_byte(loss: Tensor) -> float:
    """The mean over all ranks of a loss in nats per byte, in bits."""
    mean = loss.detach().float().clone()
    zeropipe.comm.all_reduce(mean)
    return mean.item() / zeropipe.comm.get_world_size() / math.log(2)


if __name__ == "__main__":
    main()
