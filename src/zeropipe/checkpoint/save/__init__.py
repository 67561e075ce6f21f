"""How a save is written and published.

    records.py     what is saved, and the manifest that says where it lies: data
    plain.py       what is no tensor, in words that load without running code
    contents.py    which rank writes which file, with what in it; peer_keys.py: what DeepSpeed wants to find there
    files.py       one file: written whole, summed, synced; read without running code
    ownership.py   one folder: taken, given its name, removed; what in it is provably ours
    tags.py        the folder of checkpoints: a tag is begun, published, found
    saver.py       one engine's saves: who says what when
    verify.py      whether what was published is still whole

Readers take from here what both sides must know: records, words, names.
"""
