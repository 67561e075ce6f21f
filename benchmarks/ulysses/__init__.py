"""Memory of activations where ranks share a sequence."""
