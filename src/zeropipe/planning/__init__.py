"""What a run needs before it runs: rehearsals of its ranks, and what a device makes of them."""
