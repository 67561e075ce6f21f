"""Schedules in DeepSpeed's form: step by step, what one stage does with its buffers. The same executor runs them."""
