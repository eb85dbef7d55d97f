#!/usr/bin/env python3
"""`internlm-lite doctor` from a checkout: see internlm_lite/cli/doctor.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.doctor import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that hangs in a collective may hold up every other way out
