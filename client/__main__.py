"""`python -m client`: the `shoal` command without its script on the PATH."""

import sys

from client.cli import main

if __name__ == "__main__":
    sys.exit(main())
