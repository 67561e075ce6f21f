"""Claim: at one process the engine costs next to nothing over the loop that anyone would write."""
