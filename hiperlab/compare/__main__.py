"""`python -m hiperlab.compare`."""

import sys

from hiperlab.compare.main import main

if __name__ == "__main__":
    sys.exit(main())
