from __future__ import annotations

import sys

from benchmarks.gpu_check.runner import main

sys.exit(main())
