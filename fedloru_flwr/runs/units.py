"""Sizes, times and ratios as people read them."""

from __future__ import annotations

_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def format_bytes(num_bytes: float) -> str:
    """Return a size in SI units (1 kB = 1000 B) with three significant digits: ``"0 B"``, ``"1.23 MB"``."""
    value = float(num_bytes)
    for unit in _SIZE_UNITS:
        digits = _three_digits(value) if unit != "B" else f"{value:.0f}"
        if float(digits) < 1000 or unit == _SIZE_UNITS[-1]:
            break
        value /= 1000
    return f"{digits} {unit}"


def format_duration(seconds: float) -> str:
    """Return a time as ``m:ss``, or ``h:mm:ss`` from an hour on: ``"0:41"``, ``"12:05"``, ``"1:02:03"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_ratio(ratio: float) -> str:
    """Return a factor with three significant digits: ``"18.2x"``."""
    return f"{_three_digits(ratio)}x"


def _three_digits(value: float) -> str:
    for limit, decimals in ((9.995, 2), (99.95, 1)):
        if value < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"
