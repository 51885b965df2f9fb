"""``python -m cmi_lightning`` is ``cmi-lightning``."""

import sys

from cmi_lightning.cli import main

sys.exit(main())
