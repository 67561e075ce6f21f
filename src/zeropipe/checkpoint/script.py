"""The small script that stands beside every checkpoint, where users look for it."""

from __future__ import annotations

from typing import Final

SCRIPT_NAME: Final = "zero_to_fp32.py"
SCRIPT: Final = '''\
#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this folder as ordinary files.

    python zero_to_fp32.py . OUTPUT_FOLDER [--tag TAG] [--safe_serialization] [--max_shard_size 5GB]
"""

from zeropipe.utils.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''
