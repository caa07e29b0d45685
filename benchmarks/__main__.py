"""`python -m benchmarks --help`; from an installed library, `e2e-sae bench --help`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
