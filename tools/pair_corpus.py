#!/usr/bin/env python3
"""`internlm-lite pair-corpus` from a checkout: see internlm_lite/cli/pair_corpus.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.cli.pair_corpus import main

if __name__ == "__main__":
    sys.exit(main())
