#!/usr/bin/env python3
"""The first minutes on a GPU, from a checkout: see internlm_lite/cli/gpu_check.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
