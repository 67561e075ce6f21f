"""The universal format: one folder per parameter with its whole fp32 value and moments."""
