"""One folder per claim about speed or memory; each is one command that writes its table and its numbers."""
