"""Claim: on the backend's own collectives, what Python does for one takes the same time at any number of ranks."""
