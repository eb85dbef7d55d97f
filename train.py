#!/usr/bin/env python3
"""`internlm-lite train` from a checkout: see internlm_lite/cli/train.py."""

from internlm_lite.cli.train import main

if __name__ == "__main__":
    main()
