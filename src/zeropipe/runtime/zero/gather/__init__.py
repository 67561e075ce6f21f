"""Stage 3: who needs a whole parameter, and when: shards, units, hooks, the order of fetches, whole models."""
