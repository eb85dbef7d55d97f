#!/usr/bin/env python3
"""Continue prompts with a trained model.

python tools/generate.py --checkpoint demo/ckpts --prompt "def main" --prompt "The following"
echo "import os" | python tools/generate.py --checkpoint demo/ckpts --greedy
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.errors import ConfigError, InternLMError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a save folder, or one checkpoint of it")
    parser.add_argument(
        "--prompt", action="append", help="text to continue; may be given again (default: standard input)"
    )
    parser.add_argument("--tokenizer", help="sentencepiece model (default: the config's data.tokenizer)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--greedy", action="store_true", help="always the most likely token; same as --temperature 0")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0, help="only the k most likely tokens (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only the most likely tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: as it was trained")
    return parser.parse_args()


def continue_prompts(arguments: argparse.Namespace) -> None:
    import torch

    from internlm_lite.data.tokenizer import Tokenizer
    from internlm_lite.generate.generate import generate
    from internlm_lite.generate.load import load_model
    from internlm_lite.generate.sample import Sampling
    from internlm_lite.mesh.mesh import single_process_mesh

    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature, arguments.top_k, arguments.top_p, arguments.seed)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    mesh = single_process_mesh(torch.device("cuda" if on_gpu else "cpu"))
    dtype = arguments.dtype and f"torch.{arguments.dtype}"
    model, config = load_model(arguments.checkpoint, mesh, dtype)
    path = arguments.tokenizer or config.data.tokenizer
    if path is None:
        raise ConfigError("the model's config names no data.tokenizer: give one with --tokenizer FILE.model")
    tokenizer = Tokenizer(Path(path))
    prompts = arguments.prompt or [sys.stdin.read()]
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    continued = generate(
        model, [start + tokenizer.encode(text) for text in prompts], arguments.max_new_tokens, sampling, tokenizer.eos
    )
    for prompt, tokens in zip(prompts, continued, strict=True):
        print(f"{prompt}{tokenizer.decode(tokens)}")
        if len(prompts) > 1:
            print("-" * 40)


def main() -> None:
    from internlm_lite.runtime.place import adopt_s3_keys

    arguments = parse_arguments()
    try:
        adopt_s3_keys(os.environ)
        continue_prompts(arguments)
    except InternLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
