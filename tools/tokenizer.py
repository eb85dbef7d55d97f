#!/usr/bin/env python3
"""`internlm-lite tokenizer` from a checkout: see internlm_lite/cli/tokenize_text.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.tokenize_text import main

if __name__ == "__main__":
    sys.exit(main())
