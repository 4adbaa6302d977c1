"""`python -m bits_async` is `bits-async`."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main())
