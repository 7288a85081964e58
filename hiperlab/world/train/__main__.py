"""`python -m hiperlab.world.train`."""

import sys

from hiperlab.world.train.door import main

if __name__ == "__main__":
    sys.exit(main())
