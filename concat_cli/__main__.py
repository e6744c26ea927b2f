"""`python -m concat_cli` and `torchrun -m concat_cli`."""

import sys

from concat_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
