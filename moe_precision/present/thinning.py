"""Which records a chart shows where there are more than it can take."""

from __future__ import annotations


def evenly_thinned(records: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``records``, evenly spaced, the first and the last among them.

    All of them where they are few enough, and none where not even two are within ``most``.
    """
    if records <= most:
        return list(range(records))
    return [round(i * (records - 1) / (most - 1)) for i in range(most)] if most >= 2 else []
