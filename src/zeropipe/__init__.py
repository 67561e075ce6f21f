"""zeropipe: ZeRO, pipeline parallelism and compressed communication for PyTorch."""

__version__ = "0.1.0"
