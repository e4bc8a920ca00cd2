"""How a long run says what it came to: a line a figure, each right or wrong, and then the verdict."""

from __future__ import annotations

from collections.abc import Iterable

Row = tuple[str, str, bool]
"""A figure's name, the figure, and whether it may be so."""


def show(rows: Iterable[Row], praise: str) -> bool:
    """Prints them, and at the end `praise` where all is well. Gives whether it is."""
    rows = list(rows)
    width = max(len(what) for what, _, _ in rows)
    print()
    for what, value, is_well in rows:
        print(f"{'ok  ' if is_well else 'FAIL'} {what:<{width}}  {value}")
    are_well = all(is_well for _, _, is_well in rows)
    print(f"\n{praise if are_well else 'the run failed'}")
    return are_well


__all__ = ["Row", "show"]
