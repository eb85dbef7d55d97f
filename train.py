#!/usr/bin/env python3
"""The same as `internlm-lite train`, as a file for torchrun and srun: see internlm_lite/cli/train.py."""

import sys

from internlm_lite.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
