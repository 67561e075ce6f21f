"""Copies of a run's state in memory that outlasts its processes: their form, where they lie, and how they are read."""
