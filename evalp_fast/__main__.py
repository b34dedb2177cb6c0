"""`python -m evalp_fast`: the command line, where the console script is not on the path."""

import sys

from evalp_fast.cli import main

if __name__ == "__main__":
    # Training records the command it was started with: as a person would type it.
    sys.argv[0] = "evalp-fast"
    sys.exit(main())
