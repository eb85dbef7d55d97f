"""Continue prompts with a trained model.

    internlm-lite generate --checkpoint demo/ckpts --prompt "def main" --prompt "The following"
    echo "import os" | internlm-lite generate --checkpoint demo/ckpts --greedy

Its checkpoint may lie on S3, with the keys in the environment as for train.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.cli.options import add_device, check_at_least, new_parser, s3_settings
from internlm_lite.errors import ConfigError
from internlm_lite.runtime.dist_env import adopt_s3_keys, read_dist_env
from internlm_lite.runtime.tool import add_s3_option, run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("generate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="save folder (its newest), FOLDER/STEP, one checkpoint")
    add("--prompt", action="append", metavar="TEXT", help="continue this; may be given again (default: standard input)")
    add("--tokenizer", metavar="FILE", help="tokenizer file or folder (default: the config's data.tokenizer)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (128)")
    add("--greedy", action="store_true", help="always the most likely token; same as --temperature 0")
    add("--temperature", type=float, default=0.8, metavar="T", help="lower: likelier tokens (0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens (0: all)")
    add("--top-p", type=float, default=0.95, metavar="P", help="only the likeliest tokens of this probability (0.95)")
    add("--seed", type=int, default=0, metavar="N", help="the same one draws the same tokens (0)")
    add_device(parser)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as it was trained")
    add_s3_option(parser)
    arguments = parser.parse_args(argv)
    check_at_least(parser, arguments, max_new_tokens=1)
    return arguments


def continue_prompts(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from internlm_lite.data.tokenizer import Tokenizer
    from internlm_lite.generate.decode import generate
    from internlm_lite.generate.load_model import load_model
    from internlm_lite.generate.sample import Sampling
    from internlm_lite.mesh.mesh import single_process_mesh
    from internlm_lite.runtime.device import bind_device

    adopt_s3_keys(os.environ)
    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature, arguments.top_k, arguments.top_p, arguments.seed)
    mesh = single_process_mesh(bind_device(read_dist_env(os.environ, "single"), arguments.device))
    dtype = arguments.dtype and f"torch.{arguments.dtype}"
    model, config = load_model(arguments.checkpoint, mesh, dtype, s3_settings(arguments.s3))
    path = arguments.tokenizer or config.data.tokenizer
    if path is None:
        raise ConfigError("the model's config names no data.tokenizer: give one with --tokenizer FILE")
    tokenizer = Tokenizer(Path(path))
    if arguments.prompt is None and sys.stdin.isatty():
        print("text to continue, then Ctrl-D on a line of its own:", file=sys.stderr)
    prompts = arguments.prompt or [sys.stdin.read()]
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    continued = generate(
        model, [start + tokenizer.encode(text) for text in prompts], arguments.max_new_tokens, sampling, tokenizer.eos
    )
    for prompt, tokens in zip(prompts, continued, strict=True):
        print(f"{prompt}{tokenizer.decode(tokens)}")
        if len(prompts) > 1:
            print("-" * 40)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(continue_prompts, arguments), has_s3_option=True)
