"""Claim: on one GPU zeropipe trains as fast as plain PyTorch, in less memory, and larger models with offload."""
