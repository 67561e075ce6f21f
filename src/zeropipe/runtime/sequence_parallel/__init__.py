"""Sequence parallelism: ranks that share one sequence, each with an equal run of its tokens (DeepSpeed-Ulysses)."""
