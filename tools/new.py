#!/usr/bin/env python3
"""`internlm-lite new` from a checkout: see internlm_lite/cli/new.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.new import main

if __name__ == "__main__":
    sys.exit(main())
