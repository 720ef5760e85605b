"""``python -m effkernels`` is the command ``effkernels``."""

from __future__ import annotations

import sys

from effkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
