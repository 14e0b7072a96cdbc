"""``python -m nabla_fast.cli``."""

import sys

from nabla_fast.cli import main

sys.exit(main())
