"""How what was measured is told."""


def gain(ratio: float, better: str, worse: str) -> str:
    """Such as "8.4× faster"; of a ratio below 1 "1.2× slower"."""
    return f"{ratio:.1f}× {better}" if ratio >= 1 else f"{1 / ratio:.1f}× {worse}"
