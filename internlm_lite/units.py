"""Numbers and names for people: bytes, counts and durations as text and back, rounding, text for a terminal."""

import argparse

YEAR_SECONDS = 365 * 24 * 3600


def human_bytes(n_bytes: float) -> str:
    """1536 -> '1.50 KiB'; binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n_bytes) < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def human_count(n: float) -> str:
    """20089943040 -> '20.09 B'; decimal units K, M, B, T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= limit:
            return f"{n / limit:.2f} {unit}"
    return f"{n:g}"


def human_seconds(seconds: float) -> str:
    """3725.0 -> '1:02:05'; below one minute '12.3 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def wait_seconds(text: str) -> float:
    """'600' -> 600.0: the type of a command-line time limit. Raises ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= YEAR_SECONDS:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected seconds: a number > 0, and no more than a year's")
    return seconds


def positive_number(text: str) -> float:
    """'1e21' -> 1e21: the type of a command-line amount. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e30:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number > 0, such as 0.5 or 1e21")
    return number


def memory_bytes(text: str) -> int:
    """'80GB' -> 80000000000, '2GiB' -> 2147483648: the type of a command-line size; '80' are GB. Raises
    ArgumentTypeError."""
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    number, unit = text.rstrip("MGTBi"), text[len(text.rstrip("MGTBi")) :]
    unit = unit or "GB"
    try:
        n_bytes = float(number) * units[unit]
    except (ValueError, KeyError):
        n_bytes = 0
    if not 1 <= n_bytes < 2**60:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size with its unit, such as 80GB or 79.6GiB")
    return int(n_bytes)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def escaped(text: str, keep: str = "") -> str:
    """`text` as a terminal may show it: control and invisible characters as escapes, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
