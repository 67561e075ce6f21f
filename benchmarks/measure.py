"""Measures anew what README speaks of: five benchmarks one after the other, each writes its own tables; 20 minutes.

    python -m benchmarks.measure                                        # into the benchmarks' own folders
    python -m benchmarks.measure --peer-python PYTHON_WITH_DEEPSPEED    # with DeepSpeed beside it
    python -m benchmarks.measure --try --out /tmp/tried                 # the smallest rounds: do the commands work?

Nothing else should run on the machine. Ends with the seconds that each took; exits with 1 where one failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEEPSPEED = ("zero3", "data_parallel", "pipeline")  # ask another interpreter for it
# name -> (arguments, arguments of the smallest rounds); about 6, 4, 4, 3 and 1 minutes on two cores.
RUNS = {
    "zero3": (
        "--rounds 3 --warm-up 2 --steps 4 --only ddp zeropipe_3 zeropipe_3_init fsdp2 deepspeed_3",
        "--rounds 1 --warm-up 1 --steps 1 --size tiny --dtypes fp32 --only ddp zeropipe_3 fsdp2",
    ),
    "data_parallel": (
        "--dtypes fp32 --rounds 3 --steps 6 --only ddp zeropipe_0 zeropipe_1 zeropipe_2 "
        "zero_redundancy_optimizer fsdp2 deepspeed_1 deepspeed_2",
        "--rounds 1 --warm-up 1 --steps 1 --size tiny --dtypes fp32 --only ddp zeropipe_2",
    ),
    "pipeline": (
        "--rounds 2 --warm-up 1 --steps 4 --only torch_1f1b torch_interleaved torch_zbv zeropipe_1f1b "
        "zeropipe_interleaved zeropipe_zb-h1 zeropipe_zbv deepspeed_1f1b",
        "--rounds 1 --warm-up 1 --steps 1 --size tiny --only torch_1f1b zeropipe_1f1b",
    ),
    "growth": (
        "--parts plan stage0 stage2 stage3 --sizes 1000 4000 10000 --ranks 1",
        "--parts stage3 --sizes 100 200 --ranks 1",
    ),
    "engine_overhead": ("--rounds 15 --warm-up 6", "--rounds 2 --warm-up 1 --turn-seconds 0.01"),
}


def main() -> None:
    args = arguments()
    took = {}
    for name in args.only or RUNS:
        command = [sys.executable, "-m", f"benchmarks.{name}.run", *RUNS[name][args.smallest].split()]
        if name in DEEPSPEED and args.peer_python:
            command += ["--peer-python", args.peer_python]
        if args.out:
            command += ["--output" if name == "growth" else "--out", str(args.out / name)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT)
        took[name] = (time.perf_counter() - start, done.returncode)
    for name, (seconds, code) in took.items():
        sys.stderr.write(f"{name:16} {seconds:6.0f} s{'' if code == 0 else f'   failed with {code}'}\n")
    sys.exit(any(code for _, code in took.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS)
    parser.add_argument(
        "--try", action="store_true", dest="smallest", help="the smallest rounds, of little meaning"
    )
    parser.add_argument("--peer-python", help="interpreter that has deepspeed")
    parser.add_argument("--out", type=Path, help="folder for the tables, in place of the benchmarks' own")
    return parser.parse_args()


if __name__ == "__main__":
    main()
