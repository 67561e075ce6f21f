"""The fastest configuration that fits: what may be chosen, which to look at, and the looks."""
