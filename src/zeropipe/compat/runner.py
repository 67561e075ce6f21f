"""The names of DeepSpeed's launcher that other launchers read."""

from __future__ import annotations

from typing import Final

DEEPSPEED_ENVIRONMENT_NAME: Final = ".deepspeed_env"  # a file of NAME=VALUE lines, passed on to every node
