"""``from_pretrained`` of transformers under stage 3: its own names and conversions, our reading."""
