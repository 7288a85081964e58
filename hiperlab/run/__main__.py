"""`python -m hiperlab.run`."""

import sys

from hiperlab.run.main import main

if __name__ == "__main__":
    sys.exit(main())
