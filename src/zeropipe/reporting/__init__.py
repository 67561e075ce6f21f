"""What a run has left in its record, and the page that shows it."""


def in_words(nbytes: float) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def rate_in_words(value: float) -> str:
    """What is done a second, as a person reads it: never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
