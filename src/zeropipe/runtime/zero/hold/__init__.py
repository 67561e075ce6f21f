"""What a rank holds at every stage: partitions, their gradients and optimizer state, and the step."""
