"""What a step asks of a device: collectives, copies, kernels, and how often the host waits."""
