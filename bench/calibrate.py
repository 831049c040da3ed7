"""``python -m mcld_kernels.calibrate`` from a checkout that is not installed: ``python bench/calibrate.py``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from mcld_kernels.calibrate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
