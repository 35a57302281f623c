"""``python -m lipgan`` is ``lipgan``."""

import sys

from lipgan.cli import main

sys.exit(main())
