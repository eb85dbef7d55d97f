#!/usr/bin/env python3
"""The same as `internlm-lite evaluate`, as a file for torchrun and srun: see internlm_lite/cli/evaluate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
