"""Let ``python -m cusparge`` do what the command ``cusparge`` does."""

import sys

from cusparge.cli import main

if __name__ == "__main__":
    sys.exit(main())
