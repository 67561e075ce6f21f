"""Pure integers: where each element of each tensor lives. No torch, no communication."""
