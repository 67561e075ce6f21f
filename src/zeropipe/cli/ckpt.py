"""``zeropipe ckpt``: look into, check, compare, convert, export and prune checkpoints."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from zeropipe.checkpoint.convert import compare
from zeropipe.checkpoint.convert import convert as convert_checkpoint
from zeropipe.checkpoint.export import export as export_weights
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save import ownership, tags
from zeropipe.checkpoint.save.records import FP32, PARAM, read_manifest
from zeropipe.checkpoint.save.verify import FileState
from zeropipe.checkpoint.save.verify import verify as verify_folder
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.parallel import weights
from zeropipe.checkpoint.sources.universal import write_universal
from zeropipe.cli import bar, say, shown
from zeropipe.errors import CheckpointError

app = typer.Typer(
    help="Look into, check, compare, convert, export and prune checkpoints.", no_args_is_help=True
)

Folder = Annotated[
    Path, typer.Argument(help="The folder that was saved to, or a tag's folder in it.", metavar="FOLDER")
]
Tag = Annotated[str | None, typer.Option("--tag", "-t", help="Default: what `latest` names.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Also unpickle objects: runs code of whoever wrote the file.")
]


@app.command()
def inspect(
    folder: Folder,
    tag: Tag = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    trust: Trust = False,
) -> None:
    """Say what a checkpoint holds; no tensor is read."""
    source = open_source(folder, tag, trust=trust)
    train = source.train_state(0)
    sizes = ", ".join(f"{axis} {size}" for axis, size in source.degrees.items())
    facts = {
        "path": source.folder,
        "step": f"{train.global_steps} ({train.global_samples} samples, {train.skipped_steps} skipped)",
        "saved at": f"ZeRO stage {source.stage}, {source.world} ranks ({sizes}), {source.dtype}",
        "optimizer": source.optimizer or "none",
        "client state": ", ".join(map(str, train.client_state)) or "none",
        "tied": ", ".join(f"{a} = {b}" for a, b in source.tied.items()) or "none",
    }
    for name, value in facts.items():
        say(f"{name:>13}  {shown(value).plain}")
    say(_summary(source))
    if tensors:
        say(_tensors(source))


def _summary(source: Checkpoint) -> Table:
    """One row for each kind and dtype: how many tensors, elements, bytes."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for entry in source.module:
        sizes.setdefault((f"module {entry.kind}", entry.dtype), []).append(prod(entry.shape))
    for flat in source.flats:
        for key, dtype in flat.keys.items():
            what = {FP32: "fp32 master", PARAM: "sharded frozen"}.get(key, f"optimizer {key}")
            sizes.setdefault((what, dtype), []).extend(spec.numel for spec in flat.layout.tensors)
    table = Table("kind", "tensors", "elements", "bytes", "dtype")
    for (what, dtype), numels in sizes.items():
        nbytes = sum(numels) * getattr(torch, dtype).itemsize
        table.add_row(shown(what), str(len(numels)), f"{sum(numels):,}", _size(nbytes), shown(dtype))
    return table


def _tensors(source: Checkpoint) -> Table:
    table = Table("name", "shape", "kind", "stored as")
    for weight in weights(source):
        flat = weight.flat
        where = f"{flat.name} x {flat.layout.num_shards} shards" if weight.value is None else "module"
        table.add_row(shown(weight.name), str(weight.shape), weight.kind, shown(where))
    return table


@app.command()
def verify(folder: Folder, tag: Tag = None) -> None:
    """Check every byte against the manifest's checksums; exit 1 and name the files where anything is wrong."""
    choice = tags.choose(folder, tag)
    if not choice.candidates:
        raise CheckpointError("; ".join(choice.notices))
    candidate = choice.candidates[0].path
    manifest = None
    # Only for the bar's length; a damaged manifest is one of the findings.
    with suppress(CheckpointError):
        manifest = read_manifest(candidate)
    total = sum(record.bytes for record in manifest.files) if manifest else 0
    with bar("checking", total) as advance:
        findings = verify_folder(candidate, advance)
    table = Table("file", "bytes", "state", title=shown(candidate))
    colours = {FileState.WHOLE: "green", FileState.UNCHECKED: "yellow", FileState.EXTRA: "yellow"}
    for finding in findings:
        colour = colours.get(finding.state, "red")
        table.add_row(shown(finding.file), f"{finding.bytes:,}", Text(finding.state.value, colour))
    say(table)
    bad = [f for f in findings if f.state in (FileState.DAMAGED, FileState.MISSING)]
    if bad:
        raise CheckpointError("; ".join(f"{f.file} is {f.state.value}" for f in bad))


@app.command()
def diff(
    left: Annotated[Path, typer.Argument(metavar="LEFT")],
    right: Annotated[Path, typer.Argument(metavar="RIGHT")],
    left_tag: Annotated[str | None, typer.Option("--left-tag")] = None,
    right_tag: Annotated[str | None, typer.Option("--right-tag")] = None,
) -> None:
    """Compare two checkpoints value by value, whatever the layouts; exit 1 where they differ."""
    a, b = open_source(left, left_tag), open_source(right, right_tag)
    table = Table("name", "what", "left | right", "largest difference")
    with bar("comparing", len(list(weights(a))), files=False) as advance:
        for found in compare(a, b, advance):
            largest = "" if found.largest is None else f"{found.largest:.3g}"
            table.add_row(shown(found.name), shown(found.what), shown(found.text), largest)
    if table.row_count:
        say(table)
        raise typer.Exit(1)
    say("equal: weights, optimizer state, hyperparameters, counters and client state, bit for bit")


@app.command()
def convert(
    folder: Folder,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT")],
    to: Annotated[str, typer.Option("--to", help="deepspeed, zeropipe, universal or dcp.")] = "deepspeed",
    dp: Annotated[
        int | None, typer.Option("--dp", min=1, help="Ranks of the result; default: as saved.")
    ] = None,
    stage: Annotated[int | None, typer.Option("--stage", min=0, max=3, help="Default: as saved.")] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks; default: as saved.")
    ] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Pipeline stages: as saved, or 1.")] = None,
    tag: Tag = None,
    trust: Trust = False,
) -> None:
    """Write a checkpoint anew in a layout that another tool wants; loading in zeropipe never needs it."""
    source = open_source(folder, tag, trust=trust)
    write: Any = {"universal": write_universal, "dcp": write_dcp}.get(to)
    if write is not None:
        count = len(list(weights(source)))
    elif to in ("deepspeed", "zeropipe"):
        dp = source.degrees.get("dp", 1) if dp is None else dp
        count = dp * (tp or source.tp) * (pp or source.pp)
        at = source.stage if stage is None else stage
        write = partial(convert_checkpoint, stage=at, dp=dp, tp=tp, pp=pp)
    else:
        raise CheckpointError("convert --to", expected="deepspeed, zeropipe, universal or dcp", found=to)
    with bar("writing", count, files=False) as advance:
        path = write(source, output, progress=advance)
    say(f"wrote {path}")


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT")],
    tag: Tag = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    torch_format: Annotated[bool, typer.Option("--torch", help="torch's format, not safetensors.")] = False,
    exclude_frozen: Annotated[bool, typer.Option(help="Leave frozen parameters out.")] = False,
    drop_tied: Annotated[bool, typer.Option(help="Write tied tensors under one name only.")] = False,
    trust: Trust = False,
) -> None:
    """Write the weights as safetensors (or torch) files with an index, one tensor in memory at a time."""
    source = open_source(folder, tag, trust=trust)
    # The bar counts bytes as they will be written; integers keep their width.
    width = 4 if dtype == "fp32" else 2
    total = sum(
        prod(w.shape) * (width if w.dtype.is_floating_point else w.dtype.itemsize) for w in weights(source)
    )
    with bar("writing", total) as advance:
        files = export_weights(
            source,
            output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            safetensors=not torch_format,
            exclude_frozen=exclude_frozen,
            tied="drop" if drop_tied else "repeat",
            progress=advance,
        )
    for path in files:
        say(f"{path}  {_size(path.stat().st_size)}")


@app.command()
def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option("--keep", "-k", min=1, help="How many of the newest to keep.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove all but the newest checkpoints, and what killed saves have left; the one in `latest` stays.

    Only what saves of zeropipe made under this name: other programs' checkpoints, links and what they point to, copies
    under another name and other files stay, and do not count.
    """
    kept, gone = tags.newest(folder, keep)
    # One that cannot be removed does not keep the others: all is tried, and then it is said what failed.
    failed: list[str] = []
    for path in (*gone, *ownership.leftovers(folder)):
        if dry_run:
            say(f"would remove {path}")
            continue
        try:
            rest = ownership.remove_listed(path) if path in gone else ownership.clear(path)
        except (OSError, CheckpointError) as error:
            failed.append(str(error))
            continue
        say(f"removed {path}")
        for other in rest:
            say(f"  but for {other}, which is not zeropipe's")
    say(f"kept {', '.join(sorted(c.tag for c in kept)) or 'nothing'}")
    if failed:
        raise CheckpointError("; ".join(failed))


def _links(folder: Path) -> list[Path]:
    """Links beside the checkpoints: somebody gave what they point to another name."""
    return [path for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []


def _size(nbytes: float) -> str:
    power = next((p for p in range(3) if nbytes < 1000 ** (p + 1)), 3)
    return f"{nbytes / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"
