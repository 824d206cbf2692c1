"""python -m bitfall: the same as the command `bitfall`."""

import sys

from bitfall.cli import main

sys.exit(main())
