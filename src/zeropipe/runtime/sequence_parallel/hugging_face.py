"""Sequence parallelism in models of transformers: their attention, and the masks that they make for it.

A model runs on this rank's tokens, and one thing in it needs the others: attention. transformers looks functions up by
name, for attention and for its mask; those of one name are exchanged for ones that go by the whole sequence::

    model(input_ids, position_ids: this rank's)
      masks      made for n times the tokens, of padding and positions that are gathered first (packed sequences begin
                 where positions start again, maybe in the middle of another rank's tokens)
      a layer    queries, keys, values [batch, heads, tokens, dim] --exchange--> attention as it was --exchange-->
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from zeropipe.comm.agreement import agree
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError, describe
from zeropipe.given import Anything
from zeropipe.runtime.sequence_parallel.exchange import Heads, exchange, gather
from zeropipe.runtime.sequence_parallel.place import (
    CURRENT,
    SequenceParallel,
    exchange_with,
    initialize_sequence_parallel,
)

# Types of layers, as configurations name them, that meet other tokens in attention alone.
_ATTENTIONS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


class UlyssesSPAttentionHF:
    """An attention of transformers on the whole sequence of the ranks that share it."""

    def __init__(self, core: Callable[..., Any], name: str, group: Group, disable_in_eval: bool) -> None:
        self.core, self.name, self.group = core, name, group
        self.disable_in_eval = disable_in_eval

        # Between a model's forward and the masks that it makes: it may be one that evaluates whole sequences.
        self.whole = False
        self._met = True  # whether a layer has asked for it, in a forward on a part
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = (
            None  # the latest positions: of this rank, of all
        )

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Anything,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int | None = None,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> SequenceParallel | None:
        """Have ``sequence_parallel_size`` consecutive ranks share a sequence in models of transformers. Collective.

        Args:
            model_name_or_path: a model, or the name of one that is made later and given to ``initialize``.
            core_attn_implementation: "sdpa", "flash_attention_2" or another name that transformers knows.
            sequence_parallel_size: 1 changes nothing and gives None.
            micro_batch_size, seq_length, seq_length_is_variable, max_length: taken; sizes are those of each batch.
            disable_in_eval: a model in evaluation gets whole sequences.

        Returns:
            the ``mpu`` for ``initialize``.

        Raises:
            UsageError: an attention that cannot be exchanged, such as "eager"; a size that does not divide the ranks;
                a model whose layers carry a state from token to token.
        """
        if sequence_parallel_size == 1:
            return None
        mpu = initialize_sequence_parallel(sequence_parallel_size)
        attentions, masks, making = _tables()
        if core_attn_implementation not in attentions.valid_keys() or core_attn_implementation not in masks:
            raise UsageError(
                "register_with_transformers: core_attn_implementation",
                expected=", ".join(sorted(set(attentions.valid_keys()) & set(masks))),
                found=core_attn_implementation,
                fix="use 'sdpa' (in accelerate: sp_attn_implementation='sdpa')",
            )
        name = core_attn_implementation
        ours = cls(_plain(attentions[name]), name, mpu.sequence_group, disable_in_eval)
        # Over the latest registration, not on top of it: both would exchange.
        attentions.register(name, ours.attend)
        masks.register(name, _Around(ours, _plain(masks[name]), ours.mask))
        for function, around in (
            ("find_packed_sequence_indices", ours.packed),
            ("packed_sequence_compatibility_function", ours.by_positions),
            ("blockwise_overlay", ours.refuse),
        ):
            if hasattr(making, function):
                setattr(making, function, _Around(ours, _plain(getattr(making, function)), around))
        exchange_with(ours)
        if isinstance(model_name_or_path, torch.nn.Module):
            ours.prepare(model_name_or_path)
        return mpu

    def prepare(self, model: torch.nn.Module) -> None:
        """Have ``model``, if it is one of transformers, use this attention, and its inputs looked at."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "_attn_implementation"):
            return
        if config._attn_implementation != self.name:
            model.set_attn_implementation(self.name)  # type: ignore[operator]
        if config._attn_implementation != self.name:
            raise UsageError(
                f"{type(model).__name__} under sequence parallelism",
                expected=f"a model that takes attn_implementation={self.name!r}",
                found=config._attn_implementation,
            )
        takes = inspect.signature(model.forward).parameters
        if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise UsageError(
                f"{type(model).__name__} under sequence parallelism",
                expected="a model whose forward takes position_ids",
                found="one that cannot be told where its tokens are in the sequence",
            )
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        recurrent = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - _ATTENTIONS)
        if recurrent:
            raise UsageError(
                f"{type(model).__name__} under sequence parallelism",
                expected="layers that meet other tokens in attention alone",
                found=f"layers of type {', '.join(recurrent)}",
            )
        if _before not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_before, with_kwargs=True)
            model.register_forward_hook(_after)

    # What transformers calls. Each is left to what was there before where a model sees whole sequences.

    @torch.compiler.disable  # type: ignore[misc]
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``query`` [batch, heads, tokens, dim] -> [batch, tokens, heads, dim], of this rank's tokens."""
        if CURRENT.attention is not self or (self.disable_in_eval and not module.training):
            if (
                CURRENT.attention is self
                and getattr(attention_mask, "shape", key.shape[2:3])[-1] != key.shape[2]
            ):
                # Whoever made the mask could not see that the model evaluates: nobody has told of this model.
                raise UsageError(
                    f"{type(module).__name__} of a model that evaluates whole sequences and was not registered",
                    fix="pass the model to register_with_transformers, or to initialize with its mpu",
                )
            return self.core(module, query, key, value, attention_mask, *args, **kwargs)
        self._met = True
        ranks, tokens = self.group.size, query.shape[2]
        self._check(module, query, key, attention_mask, kwargs)
        plan = Heads.of(query, key, 1, ranks)
        query, key, value = (
            exchange(plan.spread(x, 1), self.group, split=1, join=2) for x in (query, key, value)
        )
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = plan.own(kwargs["s_aux"], self.group.rank)
        positions = kwargs.get("position_ids")
        # Only these read where packed sequences begin from positions; others have it in their masks.
        if positions is not None and positions.shape[-1] == tokens and "flash" in self.name:
            kwargs["position_ids"] = self._positions(positions)
        local = _WithGroups(module, plan.groups) if hasattr(module, "num_key_value_groups") else module
        output, _ = self.core(local, query, key, value, attention_mask, *args, **kwargs)
        return exchange(output, self.group, split=1, join=2)[:, :, : plan.queries], None

    def mask(self, before: Callable[..., Any], **given: Any) -> Any:
        """A mask for all tokens of the sequence, from what describes this rank's."""
        length, padding = given["q_length"], given.get("attention_mask")
        same = length == given["kv_length"] and not given.get("q_offset") and not given.get("kv_offset")
        if not same or given.get("use_vmap"):
            raise UsageError(
                "a mask under sequence parallelism",
                expected="one of the tokens on themselves, from the functions of transformers",
                found="a function of the model's own" if same else "a cache, or tokens on other tokens",
                fix="train without it, or with sequence_parallel_size 1",
            )
        if padding is not None:
            given["attention_mask"] = gather(padding, self.group)
        whole = length * self.group.size
        return before(**given | {"q_length": whole, "kv_length": whole})

    def packed(self, before: Callable[..., Any], position_ids: torch.Tensor) -> Any:
        return before(self._positions(position_ids))

    def by_positions(
        self,
        before: Callable[..., Any],
        mask: Callable[..., Any],
        position_ids: torch.Tensor,
        packed: torch.Tensor,
    ) -> Any:
        return before(mask, self._positions(position_ids), packed)

    def refuse(self, before: Callable[..., Any], *given: Any) -> Any:
        raise UsageError(
            "a mask of blocks within the sequence (images, say) under sequence parallelism",
            fix="train with sequence_parallel_size 1",
        )

    def before(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before each forward of a model: is it on a part of the sequence, of one length everywhere, in which place?"""
        self.whole, self._gathered, self._met = self.disable_in_eval and not model.training, None, True
        tokens = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None),
            None,
        )
        if self.whole or not isinstance(tokens, torch.Tensor):
            return args, kwargs
        self._met = False
        size, length = tokens.shape[:2]
        # In exchanges of different sizes they would wait for each other, or read beyond what was sent.
        agree({"the shape [batch, tokens] of a part of a sequence": f"{[size, length]}"}, self.group)
        if len(args) < 3 and kwargs.get("position_ids") is None:
            start = self.group.rank * length
            places = torch.arange(start, start + length, device=tokens.device)
            kwargs = {**kwargs, "position_ids": places.expand(size, -1)}
        return args, kwargs

    def after(self, model: torch.nn.Module) -> None:
        """After a forward: a model with an attention of its own has computed on a part as if it were the whole."""
        if not self._met:
            raise UsageError(
                f"{type(model).__name__} under sequence parallelism",
                expected=f"a model that asks transformers for its attention {self.name!r}",
                found="none of its layers did",
                fix="use a model of transformers that has attn_implementation, or DistributedAttention",
            )

    def _positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Of all tokens. The same ones are asked for several times in a forward."""
        if self._gathered is None or not _same(self._gathered[0], position_ids):
            self._gathered = position_ids, gather(position_ids, self.group, join=position_ids.ndim - 1)
        return self._gathered[1]

    def _check(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        whole = query.shape[2] * self.group.size
        if key.shape[2] != query.shape[2]:
            found = (
                f"{query.shape[2]} queries on {key.shape[2]} keys: a cache, or attention to another sequence"
            )
        elif kwargs.get("position_bias") is not None:
            found = "a bias by head and position"
        elif isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] != 1:
            found = "a mask for each head"
        elif isinstance(mask, torch.Tensor) and mask.shape[-1] != whole:
            found = f"a mask of shape {tuple(mask.shape)}"
        else:
            return
        raise UsageError(
            f"{type(module).__name__} under sequence parallelism",
            rank=self.group.ranks[self.group.rank],
            expected=f"attention of a sequence to itself, its mask, if any, for all {whole} tokens",
            found=found,
        )


@torch.compiler.disable  # type: ignore[misc]
def _before(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    # A hook of the model, which may outlive a registration.
    return (args, kwargs) if CURRENT.attention is None else CURRENT.attention.before(model, args, kwargs)


@torch.compiler.disable  # type: ignore[misc]
def _after(model: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
    if CURRENT.attention is not None:
        CURRENT.attention.after(model)


class _Around:
    """A function of transformers, and what is called around it where a model sees a part of a sequence."""

    def __init__(
        self, owner: UlyssesSPAttentionHF, plain: Callable[..., Any], around: Callable[..., Any]
    ) -> None:
        self.core, self._owner, self._around = plain, owner, around

    @torch.compiler.disable  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._owner.whole or CURRENT.attention is not self._owner:
            return self.core(*args, **kwargs)
        return self._around(self.core, *args, **kwargs)


class _WithGroups:
    """An attention module, but for the number of query heads to a key head: what it is on this rank."""

    def __init__(self, module: torch.nn.Module, groups: int) -> None:
        self._module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _plain(function: Any) -> Any:
    """What transformers had before any registration."""
    owner = getattr(function, "__self__", function)
    return getattr(owner, "core", function)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are the same memory, so of one content while the first is kept."""
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _tables() -> tuple[Any, Any, Any]:
    """transformers' functions of attention and of masks by name, and the module that makes masks."""
    try:
        from transformers import masking_utils
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, masking_utils
    except (ImportError, AttributeError) as error:
        raise UsageError(
            describe("sequence parallelism in models of transformers", fix="install transformers 5")
        ) from error
