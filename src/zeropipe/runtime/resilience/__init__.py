"""Runs that survive: what ends them from outside, what is kept of the last good step, and how a run finds it again."""
