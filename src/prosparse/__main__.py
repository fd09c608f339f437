"""`python -m prosparse` is `prosparse`."""

import sys

from prosparse.cli import main

sys.exit(main())
