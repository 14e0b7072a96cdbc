"""``python -m nabla_fast.cli``: the command ``nabla-fast``."""

import sys

from nabla_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
