"""`python -m unroll` runs the command `unroll`."""

import sys

from unroll.cli import main

if __name__ == "__main__":
    sys.exit(main())
