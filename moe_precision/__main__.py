"""``python -m moe_precision``: the command line, for launchers that start a module (torchrun)."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
