#!/usr/bin/env python3
"""`internlm-lite doctor` from a checkout: see internlm_lite/cli/doctor.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.doctor import run

if __name__ == "__main__":
    run()
