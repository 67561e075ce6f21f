"""What the benchmarks share: the model, the contenders, the measured process, and the rounds around it."""
