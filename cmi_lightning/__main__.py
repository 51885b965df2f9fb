"""``python -m cmi_lightning`` is ``cmi-lightning``."""

import sys

from cmi_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
