"""Features of DeepSpeed that are small modules of their own here."""
