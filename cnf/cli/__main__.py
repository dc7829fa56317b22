"""`python -m cnf.cli`, the console script without the script; torchrun starts it."""

import sys

from cnf.cli import main

if __name__ == "__main__":
    sys.exit(main())
