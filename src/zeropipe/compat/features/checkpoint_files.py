"""Checkpoint files one by one, as scripts of DeepSpeed read and write them beside an engine's own.

Behind ``runtime.checkpoint_engine`` (an object that saves and loads) and ``runtime.state_dict_factory`` (Megatron's
files, one for each tensor-parallel rank, for another number of those ranks)::

    files of 2 ranks        rank 0 of 1         1 of 2       1 of 4
    | 0 | 1 |               0 and 1 joined      file 1       the second half of file 0
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.save.files import write_torch
from zeropipe.errors import CheckpointError, UsageError
from zeropipe.given import Anything


@dataclass(eq=True)
class CheckpointCommitInfo:
    tag: str
    save_dir: str
    save_latest: bool


class CheckpointEngine:
    """Saves and loads one object a file; a base for classes that do it another way."""

    def __init__(self, config_params: Anything = None) -> None:
        self._commit: CheckpointCommitInfo | None = None

    def create(self, info: Anything) -> None:
        """A checkpoint begins. ``info``: a ``CheckpointCommitInfo``, or a tag."""

    def save(self, state_dict: Anything, path: str) -> None:
        """Write ``state_dict`` to the file ``path``. To be written by a subclass."""
        raise UsageError(
            f"{type(self).__name__}.save is not written", fix="write it, or use TorchCheckpointEngine"
        )

    def load(self, path: str, map_location: Anything = None) -> Any:
        """Read the file ``path``. To be written by a subclass."""
        raise UsageError(
            f"{type(self).__name__}.load is not written", fix="write it, or use TorchCheckpointEngine"
        )

    def commit(self, info: Anything) -> bool:
        """All files of the checkpoint are written."""
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether files are written after ``save`` has returned."""
        return False

    def set_commit_info(self, info: CheckpointCommitInfo) -> None:
        self._commit = info

    def get_commit_info(self) -> CheckpointCommitInfo | None:
        return self._commit

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share memory do so again when they are loaded."""
        return False

    def cleanup(self) -> None: ...


class TorchCheckpointEngine(CheckpointEngine):
    """torch's files, in the call itself; a file is on the disk when ``save`` returns."""

    def save(self, state_dict: Anything, path: str) -> None:
        write_torch(Path(path), state_dict)

    def load(self, path: str, map_location: Anything = None) -> Any:
        """Raises CheckpointError for what holds more than tensors and plain values: that would run code of the file."""
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}",
                fix="torch.load(path, weights_only=False), which runs code of whoever wrote the file",
            ) from error

    def preserves_storage_sharing(self) -> bool:
        return True


# Megatron's files: by the end of a tensor's name the dim that ranks share; what is not named, all have.
_COLUMN = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "word_embeddings.weight",
           "final_linear.weight")  # fmt: skip
_ROW = ("attention.dense.weight", "self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
_QKV = ("query_key_value.weight", "query_key_value.bias")
_MODULES = ("model", "module")  # under which a file keeps the weights


class MegatronSDLoader:
    """``ckpt_list``: the files, in the order of ranks. ``version``: of the order of query, key and value in one tensor;
    0: each apart, which are joined one by one; later ones: as rows of heads, which are joined as they lie."""

    def __init__(
        self, ckpt_list: Sequence[str], version: float | None, checkpoint_engine: CheckpointEngine | None
    ) -> None:
        if not ckpt_list:
            raise CheckpointError(
                "no checkpoint files were given", expected="one for each tensor-parallel rank"
            )
        self.module_key: str | None = None
        self.ckpt_list, self.version = list(ckpt_list), version
        self.checkpoint_engine = checkpoint_engine or TorchCheckpointEngine()
        missing = [path for path in ckpt_list if not os.path.exists(path)]
        if missing:
            raise CheckpointError(f"checkpoint files are missing: {', '.join(missing)}")

    def load(
        self,
        mp_world_size: int,
        mp_rank: int,
        module_key: str | None = "auto",
        is_pipe_parallel: bool = False,
        quantize: bool = False,
        **_: Anything,
    ) -> tuple[str, Any, tuple[None, int]]:
        """(the file or the first of them, its contents with this rank's weights, (None, files that were joined)).

        ``module_key``: where a file has the weights; "auto": ``model`` or ``module``; None: it is the weights.
        ``is_pipe_parallel``: files of layers, of which one is as good as another where only one rank is wanted.
        Raises CheckpointError where the files do not divide among ``mp_world_size`` ranks.
        """
        if quantize:
            raise UsageError("state_dict_factory: quantize is not offered", fix="load without it")
        files = self.ckpt_list
        if is_pipe_parallel and module_key is not None and mp_world_size > 1 and len(files) != mp_world_size:
            files = files[:mp_world_size]
        self.module_key = module_key
        count = len(files)
        if count % mp_world_size and mp_world_size % count:
            raise CheckpointError(
                f"files of {count} tensor-parallel ranks for {mp_world_size}",
                expected="a divisor or a multiple",
            )
        if count >= mp_world_size:
            per = count // mp_world_size
            mine = files[mp_rank * per : (mp_rank + 1) * per]
            read = [self.checkpoint_engine.load(path, map_location="cpu") for path in mine]
            if per == 1:
                return mine[0], read[0], (None, 1)
            parts = [self.get_module(one) for one in read]
            joined = {name: self._join(name, [part[name] for part in parts]) for name in parts[0]}
            return mine[0], self.set_module(read[0], joined), (None, per)
        pieces = mp_world_size // count
        path = files[mp_rank // pieces]
        whole = self.checkpoint_engine.load(path, map_location="cpu")
        cut = {n: self._cut(n, v, pieces, mp_rank % pieces) for n, v in self.get_module(whole).items()}
        return path, self.set_module(whole, cut), (None, 1)

    def _version(self, name: str) -> float:
        if self.version is None:
            raise CheckpointError(
                f"how query, key and value lie in '{name}' is not known", fix="pass version=0, 1.0 or 2.0"
            )
        return self.version

    def _join(self, name: str, values: Sequence[Any]) -> Any:
        if name.endswith(_QKV) and self._version(name) == 0:
            thirds = zip(*(value.chunk(3) for value in values), strict=True)
            return torch.cat([torch.cat(third) for third in thirds])
        if name.endswith((*_COLUMN, *_QKV)):
            return torch.cat(list(values))
        return torch.cat(list(values), dim=1) if name.endswith(_ROW) else values[0]

    def _cut(self, name: str, value: Any, pieces: int, at: int) -> Any:
        dim = 1 if name.endswith(_ROW) else 0
        if not name.endswith((*_COLUMN, *_QKV, *_ROW)):
            return value
        if name.endswith(_QKV) and self._version(name) == 0:
            return torch.cat([self._even(name, third, pieces, 0)[at] for third in value.chunk(3)])
        return self._even(name, value, pieces, dim)[at].clone()

    def _even(self, name: str, value: torch.Tensor, pieces: int, dim: int) -> tuple[torch.Tensor, ...]:
        if value.shape[dim] % pieces:
            raise CheckpointError(
                f"'{name}' of shape {tuple(value.shape)} cannot be cut in {pieces} along dim {dim}",
                fix="load it at a tensor-parallel degree that divides it",
            )
        return value.chunk(pieces, dim)

    def get_module(self, sd: Anything) -> dict[str, Any]:
        """The weights in the contents of a file."""
        key = self._key(sd)
        weights: dict[str, Any] = sd if key is None else sd[key]
        return weights

    def set_module(self, sd: Anything, module: dict[str, Any]) -> Any:
        """The contents with other weights."""
        key = self._key(sd)
        return module if key is None else {**sd, key: module}

    def _key(self, sd: Mapping[str, Any]) -> str | None:
        if self.module_key != "auto":
            return self.module_key
        found = [key for key in _MODULES if key in sd]
        if len(found) != 1:
            raise CheckpointError(
                "the weights in a checkpoint file",
                expected="under 'model' or under 'module'",
                found=", ".join(map(str, sd)),
                fix="pass module_key=",
            )
        return found[0]

    def sanity_check(self, ckpt_file_name: str) -> None:
        """Raise CheckpointError where a file has none of the tensors that ranks share."""
        weights = self.get_module(self.checkpoint_engine.load(ckpt_file_name, map_location="cpu"))
        if not any(name.endswith((*_COLUMN, *_ROW, *_QKV)) for name in weights):
            raise CheckpointError(
                f"{ckpt_file_name} has none of Megatron's tensors", found=", ".join(weights)
            )


class SDLoaderFactory:
    """Loaders by the kind of files; there is Megatron's."""

    @staticmethod
    def get_sd_loader_json(json_file: Anything, checkpoint_engine: CheckpointEngine | None = None) -> Any:
        """``json_file``: a path or its contents, with ``type``, ``checkpoints`` and ``version``.

        Of another type than Megatron the contents themselves.
        """
        data = json_file if isinstance(json_file, Mapping) else json.loads(Path(json_file).read_text("utf-8"))
        if str(data["type"]).lower() in ("bloom", "ds_model"):
            return data
        return SDLoaderFactory.get_sd_loader(
            data["checkpoints"], checkpoint_engine, data["type"], data.get("version")
        )

    @staticmethod
    def get_sd_loader(
        ckpt_list: Sequence[str],
        checkpoint_engine: CheckpointEngine | None = None,
        sd_type: str = "Megatron",
        version: float | None = None,
    ) -> MegatronSDLoader:
        if sd_type != "Megatron":
            raise CheckpointError("state_dict_factory: sd_type", expected="'Megatron'", found=repr(sd_type))
        return MegatronSDLoader(ckpt_list, version, checkpoint_engine)
