"""`python -m internlm_lite COMMAND` is the same as `internlm-lite COMMAND`, also under torchrun: `torchrun -m`."""

from internlm_lite.cli.main import run

if __name__ == "__main__":
    run()
