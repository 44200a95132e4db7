"""Everything, from nothing to the files of the repository, in one command.

    python -m tools.train_fables OUT [--minutes 45] [--megabytes 75] [--threads 1]

What is in OUT already is not made again: a stopped run goes on where it was.
"""

import argparse
from pathlib import Path

from tools.train_fables.finish import tool


def main() -> None:
    """Make the text, train, export, convert, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--megabytes", type=int, default=75)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    out = args.out.resolve()
    if not (out / "train.npz").exists():
        tool("prepare", str(out), "--megabytes", str(args.megabytes))
    if not (out / "final.pt").exists():
        budget = ["--minutes", str(args.minutes), "--threads", str(args.threads)]
        tool("train", str(out), *budget)
    tool("export", str(out))
    tool("finish", str(out))


if __name__ == "__main__":
    main()
