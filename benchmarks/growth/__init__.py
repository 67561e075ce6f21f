"""Claim: what the library does with N small tensors and modules takes time in proportion to N."""
