"""`python -m cnf`, the console script without the script."""

import sys

from cnf.cli import main

if __name__ == "__main__":
    sys.exit(main())
