"""Compare the kernels with shoal/golden_digests.txt on every instruction set of this CPU.

python tools/golden_digests.py            compare; exit 1 on a difference
python tools/golden_digests.py --write    write the file first: only for a change that is meant,
                                          since processes with another file are refused
"""

import argparse
import sys

from shoal import numerics, ops
from shoal.errors import NumericsMismatch


def main() -> None:
    """Compare, or write and compare; name the first difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        numerics.GOLDEN_PATH.write_text(numerics.compute())
    golden = numerics.GOLDEN_PATH.read_text()
    for isa in ops.available_isas():
        ops.set_isa(isa)
        try:
            numerics.check(numerics.compute(), golden, isa)
        except NumericsMismatch as error:
            sys.exit(f"error: {error}")
        print(f"{isa}: {len(golden.splitlines())} digests as agreed")


if __name__ == "__main__":
    main()
