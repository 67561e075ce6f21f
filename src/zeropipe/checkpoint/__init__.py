"""Checkpoints of any size that load at any other: writing, reading, checking and reshaping them."""
