"""`python -m hiperlab.miniature`."""

import sys

from hiperlab.miniature.main import main

if __name__ == "__main__":
    sys.exit(main())
