"""`python -m hiperlab.bench`."""

import sys

from hiperlab.bench.main import main

if __name__ == "__main__":
    sys.exit(main())
