"""The command ``ds_to_universal.py``: a checkpoint as a folder in which each parameter has files of its own.

Loading at another size never needs it here; it is for scripts that call it, and for other readers of such folders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.given import Namespace


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_to_universal.py", description="Write a universal checkpoint.")
    parser.add_argument("--input_folder", required=True, help="a tag's folder, or the one that was saved to")
    parser.add_argument("--output_folder", required=True, help="the folder to write")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="accepted; nothing is extracted")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="parameters in memory at a time")
    for name in ("--keep_temp_folder", "--no_strict", "--inject_missing_state"):
        parser.add_argument(name, action="store_true", help="accepted; without effect")
    return parser.parse_args(arguments)


def main(args: Namespace = None) -> None:
    """Convert what ``args`` (of ``parse_arguments``; default: the command line) name.

    Raises CheckpointError where the input cannot be read, or something else is where the output goes.
    """
    given = parse_arguments() if args is None else args
    workers = max(1, int(getattr(given, "num_merge_workers", 2)))
    write_universal(open_source(given.input_folder), given.output_folder, workers=workers)


if __name__ == "__main__":
    main()
