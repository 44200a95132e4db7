"""Sizes as people write them: `8GiB`, `1.5GB`, `4096`; read and printed in one place (core)."""

import re
from decimal import Decimal

from shoal.errors import UsageError

UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}i": 1024**power for power, prefix in enumerate("kmgt", 1)},  # as Kubernetes writes
}
MAX_SIZE = 2**63 - 1  # what files and mappings can have
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]{0,3})")


def parse_size(text: str, *, name: str, suffix: str = "") -> int:
    """Return the bytes that `text` says: a number and B, KB..TB (1000) or KiB..TiB, Ki..Ti (1024).

    Args:
        name: the option, for messages. suffix: may follow the unit, such as "/s".

    Raises:
        UsageError: naming the option, the text and how to write it.
    """
    found = _SIZE.fullmatch(text.strip().removesuffix(suffix).strip())
    unit = found.group(2).lower() if found else ""
    if found is None or unit not in UNITS:
        hint = ""
        if found and unit in ("k", "m", "g", "t"):
            number, letter = found.group(1), unit.upper()
            hint = f": is it {number}{letter}B (1000) or {number}{letter}iB (1024)?"
        raise UsageError(f"{name} {text!r}: write a size such as 8GiB, 1.5GB or 4096{hint}")
    size = int(Decimal(found.group(1)) * UNITS[unit])
    if size > MAX_SIZE:
        raise UsageError(f"{name} {text!r}: no machine has that much; write a size such as 8GiB")
    return size


def format_size(num_bytes: int) -> str:
    """Return it with two decimals in the largest binary unit that it fills: 1.50 GiB."""
    for unit, size in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"
