"""Runs that go on: what is kept of the last good step, and how a run finds it again."""
