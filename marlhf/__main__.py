"""`python -m marlhf` is the command `marlhf`."""

import sys

from marlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
