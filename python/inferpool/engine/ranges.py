"""Numbers between two bounds, as GBNF: the decimal digits that they are written with."""

from __future__ import annotations

import math

__all__ = ["integers", "reals"]

# Digits of the longest number: what a float holds exactly.
_DIGITS = 15
_MOST = 10**_DIGITS - 1


def integers(low: float, high: float, above: bool = False, below: bool = False) -> str:
    """Whole numbers from ``low`` to ``high``; empty if there are none.

    Args:
        low: the least, or minus infinity.
        high: the greatest, or infinity.
        above: without ``low`` itself.
        below: without ``high`` itself.
    """
    least = math.ceil(max(low, -_MOST))
    most = math.floor(min(high, _MOST))
    least += above and least == low
    most -= below and most == high
    return " | ".join(_integers(least, most))


def reals(low: float, high: float, above: bool = False, below: bool = False) -> str:
    """Numbers from ``low`` to ``high``; empty if there are none. Arguments as of `integers`.

    Those are left out that share their whole part with a bound that has a fraction.
    """
    whole = integers(low, high, above, below)
    parts = [whole] if whole else []
    # With more digits than a float tells apart from a bound, a number is read as that bound.
    n_digits = max((len(str(int(abs(x)))) for x in (low, high) if abs(x) <= _MOST), default=1)
    # Ends in a digit other than 0, so that what has a fraction is never a whole number.
    fraction = f'"." [0-9]{{0,{max(_DIGITS - n_digits, 1) - 1}}} [1-9]'
    # k.f lies between k and k + 1, -k.f between -k - 1 and -k.
    low, high = max(low, -_MOST), min(high, _MOST)
    positive = _natural(max(0, math.ceil(low)), math.floor(high) - 1)
    negative = _natural(max(0, math.ceil(-high)), math.floor(-low) - 1)
    if positive:
        parts.append(f"({' | '.join(positive)}) {fraction}")
    if negative:
        parts.append(f'"-" ({" | ".join(negative)}) {fraction}')
    return " | ".join(parts)


def _integers(least: int, most: int) -> list[str]:
    negative = _natural(max(1, -most), -least)
    minus = [f'"-" ({" | ".join(negative)})'] if negative else []
    return minus + _natural(max(0, least), most)


def _natural(least: int, most: int) -> list[str]:
    """Alternatives for whole numbers, ``0 <= least``; none if ``most`` is less."""
    alternatives = []
    while least <= most:
        n_digits = len(str(least))
        end = min(most, 10**n_digits - 1)
        alternatives.append(_same_length(str(least), str(end)))
        least = end + 1
    return alternatives


def _same_length(low: str, high: str) -> str:
    """Strings of digits between two of the same length."""
    if low == high:
        return f'"{low}"' if low else '""'
    n_after = len(low) - 1
    if n_after == 0:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return f'"{low[0]}" {_group(_same_length(low[1:], high[1:]))}'
    alternatives = []
    first, last = int(low[0]), int(high[0])
    if low[1:].strip("0"):
        alternatives.append(f'"{first}" {_group(_same_length(low[1:], "9" * n_after))}')
        first += 1
    upper = []
    if high[1:].strip("9"):
        upper.append(f'"{last}" {_group(_same_length("0" * n_after, high[1:]))}')
        last -= 1
    if first <= last:
        alternatives.append(f"[{first}-{last}] [0-9]{{{n_after}}}")
    return " | ".join(alternatives + upper)


def _group(body: str) -> str:
    return f"({body})" if "|" in body else body
