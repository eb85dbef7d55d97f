"""Continue prompts with a trained model, or translate sources with an encoder-decoder.

    internlm-lite generate --checkpoint demo/ckpts --prompt "def main" --prompt "The following"
    echo "import os" | internlm-lite generate --checkpoint demo/ckpts --greedy
    internlm-lite generate --checkpoint demo/ckpts --prompts prompts.txt --stop "\\n\\n" --json > answers.jsonl
    internlm-lite generate --checkpoint demo/ckpts --prompt "def main" --beams 4 --length-penalty 0.6
    internlm-lite generate --checkpoint demo/ckpts --prompt "def main" --attention maps.html --layers 0,2-3
    internlm-lite generate --checkpoint de_en/ckpts --source "Ein Hund schläft." --beams 4
    internlm-lite generate --checkpoint de_en/ckpts --sources test.de --greedy > test.en

The text of a prompt depends on its seed, not on the prompts beside it. That of a single one is shown while it is drawn.
A line of --requests is an object with "prompt" and, if it differs, max_new_tokens, stop, stop_ids, seed; for an
encoder-decoder with "source", and "prompt" for the beginning of the target. Targets are written one a line.

Its checkpoint may lie on S3, with the keys in the environment as for train.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lite.cli.options import add_device, add_weights, check_at_least, new_parser, s3_settings
from internlm_lite.errors import ConfigError, DataError
from internlm_lite.runtime.dist_env import adopt_s3_keys, read_dist_env
from internlm_lite.runtime.tool import add_s3_option, run_tool
from internlm_lite.units import escaped

if TYPE_CHECKING:
    from internlm_lite.config.schema import DataConfig, ModelConfig
    from internlm_lite.data.tokenizer import Tokenizer
    from internlm_lite.generate.beams import Beams
    from internlm_lite.generate.prompts import Defaults, PromptLine
    from internlm_lite.generate.request import Continuation, Request
    from internlm_lite.generate.sample import Sampling
    from internlm_lite.models.stages import WholeModel

SAMPLED = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0}
"""Defaults of what only sampling has."""
KEPT = "\n\t\u3000"
"""Shown as they are on a terminal: line break, tabulator, the space of Chinese text."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("generate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="save folder (its newest), FOLDER/STEP, one checkpoint")
    add("--prompt", action="append", metavar="TEXT", help="continue this; may be given again (default: standard input)")
    add("--prompts", metavar="FILE", help="prompts, one a line; -: standard input")
    add("--source", action="append", metavar="TEXT", help="of an encoder-decoder: translate this; may be given again")
    add("--sources", metavar="FILE", help="sources, one a line; -: standard input")
    add("--requests", metavar="FILE", help="prompts as JSON lines; -: standard input")
    add("--tokenizer", metavar="FILE", help="tokenizer file or folder (default: the config's data.tokenizer)")
    add("--source-tokenizer", metavar="FILE", help="of sources (default: the config's data.source_tokenizer)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (128)")
    add("--max-positions", type=int, metavar="N", help="longest prompt in tokens (default: the model's data.seq_len)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--stop-id", action="append", default=[], type=int, metavar="ID", help="likewise, before this token")
    add("--no-eos", action="store_true", help="do not end at the tokenizer's and generation_config.json's end tokens")
    add("--greedy", action="store_true", help="always the most likely token; same as --temperature 0")
    add("--temperature", type=float, metavar="T", help="lower: likelier tokens (0.8)")
    add("--top-k", type=int, metavar="K", help="only the K most likely tokens (0: all)")
    add("--top-p", type=float, metavar="P", help="only the likeliest tokens of this probability (0.95)")
    add("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest (0: all)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="> 1: less of what is there (1)")
    add("--seed", type=int, default=0, metavar="N", help="the same one draws the same tokens (0)")
    add("--beams", type=int, metavar="K", help="beam search with K sequences, instead of drawing")
    add("--length-penalty", type=float, metavar="A", help="beams: > 0 favours long texts, < 0 short ones (1)")
    add("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (16)")
    add("--chunk", type=int, metavar="N", help="prompt tokens per forward pass, for long prompts (all)")
    add("--json", action="store_true", help="one JSON object a line instead of text")
    add("--attention", type=Path, metavar="FILE", help="instead: maps of a prompt's attention, .html or .png")
    add("--layers", metavar="LIST", help="of the maps, such as 0,2-5 (all)")
    add("--heads", metavar="LIST", help="likewise (all)")
    add_device(parser)
    add_weights(parser)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as it was trained")
    add_s3_option(parser)
    arguments = parser.parse_args(argv)
    inputs = ("prompt", "prompts", "source", "sources", "requests")
    if sum(bool(getattr(arguments, name)) for name in inputs) > 1:
        parser.error(f"--{', --'.join(inputs)}: expected one of them")
    if arguments.attention is None and (arguments.layers or arguments.heads):
        parser.error("--layers, --heads: expected also --attention FILE")
    check_at_least(parser, arguments, max_new_tokens=1, max_positions=1, batch_size=1, chunk=1)
    return arguments


def chosen_search(arguments: argparse.Namespace) -> Sampling | Beams:
    """Raises ConfigError for values out of range, and for options of drawing together with beams."""
    from internlm_lite.generate.beams import Beams
    from internlm_lite.generate.sample import Sampling

    given = {name: value for name in SAMPLED if (value := getattr(arguments, name)) is not None}
    if arguments.beams is None:
        if arguments.length_penalty is not None:
            raise ConfigError("--length-penalty: expected also --beams K; drawing has no length penalty")
        if arguments.greedy:
            given["temperature"] = 0.0
        return Sampling(**{**SAMPLED, **given}, repetition_penalty=arguments.repetition_penalty)
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"--beams with {names}: beam search draws nothing; give one or the other")
    penalty = 1.0 if arguments.length_penalty is None else arguments.length_penalty
    return Beams(arguments.beams, penalty, arguments.repetition_penalty)


def read_lines(arguments: argparse.Namespace) -> list[PromptLine]:
    from internlm_lite.generate.prompts import PromptLine, read_prompts

    path = arguments.prompts or arguments.sources or arguments.requests
    if path is not None:
        read = partial(read_prompts, as_json=bool(arguments.requests), key="source" if arguments.sources else "prompt")
        if path == "-":
            return list(read(sys.stdin.buffer, "standard input"))
        with open(path, "rb") as file:
            return list(read(file, path))
    if arguments.source:
        return [PromptLine.model_validate({"source": _whole(text)}) for text in arguments.source]
    if arguments.prompt is None and sys.stdin.isatty():
        print("text to continue, then Ctrl-D on a line of its own:", file=sys.stderr)
    texts = arguments.prompt or [sys.stdin.read()]
    return [PromptLine(prompt=_whole(text)) for text in texts]


def _whole(text: str) -> str:
    """Without lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def check_sides(lines: Sequence[PromptLine], model: ModelConfig) -> None:
    """Raises ConfigError unless an encoder-decoder is given sources, and a decoder alone prompts."""
    sources = [line.source is not None for line in lines]
    if model.num_encoder_layers and not all(sources):
        raise ConfigError(
            f"prompt {sources.index(False)} has no source, and the model is an encoder-decoder: give what it translates"
            ' with --source TEXT or --sources FILE, or as "source" in each line of --requests'
        )
    if not model.num_encoder_layers and any(sources):
        raise ConfigError(
            f"line {sources.index(True)} has a source, and the model is a decoder alone, which continues prompts: give "
            "--prompt TEXT, with the source in it as in the texts that the model was trained on"
        )


def defaults_of(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Defaults:
    from internlm_lite.generate.prompts import Defaults, end_ids

    ids = frozenset(arguments.stop_id) | (frozenset() if arguments.no_eos else end_ids(tokenizer))
    return Defaults(arguments.max_new_tokens, ids, tuple(arguments.stop), arguments.seed)


def check_lengths(requests: Sequence[Request], data: DataConfig, most: int | None) -> None:
    """Raises DataError for a prompt or source that is longer than what the model was trained on, or than `most`."""
    for number, request in enumerate(requests):
        sides = {"prompt": (request.prompt, "seq_len"), "source": (request.source, "source_seq_len")}
        for side, (tokens, key) in sides.items():
            longest = most or getattr(data, key) or data.seq_len
            if len(tokens) > longest:
                raise DataError(
                    f"{side} {number} has {len(tokens)} tokens: the model was trained on {longest} (data.{key}); "
                    f"shorten it, or try what the model makes of it with --max-positions {len(tokens)}"
                )


def continue_prompts(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from internlm_lite.apps.attention_maps.write_maps import check_target
    from internlm_lite.data.tokenizer import Tokenizer
    from internlm_lite.generate.decode import Listener, check, generate
    from internlm_lite.generate.load_model import load_model
    from internlm_lite.generate.sample import Sampling
    from internlm_lite.mesh.mesh import single_process_mesh
    from internlm_lite.runtime.device import bind_device

    adopt_s3_keys(os.environ)
    if arguments.attention is not None:
        check_target(arguments.attention)
    how, lines = chosen_search(arguments), read_lines(arguments)
    mesh = single_process_mesh(bind_device(read_dist_env(os.environ, "single"), arguments.device))
    dtype = arguments.dtype and f"torch.{arguments.dtype}"
    s3 = s3_settings(arguments.s3)
    model, config = load_model(arguments.checkpoint, mesh, dtype, s3, weights=arguments.weights)
    path = arguments.tokenizer or config.data.tokenizer
    if path is None:
        raise ConfigError("the model's config names no data.tokenizer: give one with --tokenizer FILE")
    check_sides(lines, config.model)
    tokenizer = Tokenizer(Path(path))
    own = arguments.source_tokenizer or config.data.source_tokenizer
    of_sources = tokenizer if own is None else Tokenizer(Path(own))
    defaults = defaults_of(arguments, tokenizer)
    requests = [defaults.request(line, tokenizer, of_sources) for line in lines]
    check_lengths(requests, config.data, arguments.max_positions)
    if arguments.attention is not None:
        draw_attention(arguments, model, {"source": of_sources, "prompt": tokenizer}, requests, how)
        return 0
    check(model, requests)
    for start in range(0, len(requests), arguments.batch_size):
        batch = slice(start, start + arguments.batch_size)
        one_prompt = len(requests[batch]) == 1 and lines[start].source is None
        shown = isinstance(how, Sampling) and not arguments.json and one_prompt
        if shown:
            show(lines[start].prompt)
        listen: Listener = (lambda number, piece: show(piece)) if shown else (lambda number, piece: None)
        continued = generate(model, requests[batch], how, tokenizer.decode, listen, arguments.chunk)
        for line, request, continuation in zip(lines[batch], requests[batch], continued, strict=True):
            if arguments.json:
                print(json.dumps(as_record(line, request, continuation)), flush=True)
            elif line.source is not None:
                show(" ".join(f"{line.prompt}{continuation.text}".splitlines()) + "\n")
            else:
                show("\n" if shown else f"{line.prompt}{continuation.text}\n")
                show("-" * 40 + "\n" if len(requests) > 1 else "")
    return 0


def show(text: str) -> None:
    """Write text as it is; to a terminal with escapes for what would control it."""
    shown = escaped(text, KEPT) if sys.stdout.isatty() else text
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding))  # a locale may lack characters
    sys.stdout.flush()


def as_record(line: PromptLine, request: Request, continuation: Continuation) -> dict[str, object]:
    """The object of a line of --json."""
    score = {"seed": request.seed} if continuation.score is None else {"score": continuation.score}
    source = {} if line.source is None else {"source": line.source}
    return {
        **source,
        "prompt": line.prompt,
        "text": continuation.text,
        "tokens": continuation.tokens,
        "ended_by": continuation.ended_by,
        **score,
    }


def draw_attention(
    arguments: argparse.Namespace,
    model: WholeModel,
    tokenizers: dict[str, Tokenizer],
    requests: Sequence[Request],
    how: Sampling | Beams,
) -> None:
    """Write the file of --attention; of an encoder-decoder with the target that it generates. Raises ConfigError for
    several prompts, layers and heads that are not there."""
    from internlm_lite.apps.attention_maps.weights import maps_of, numbers_of
    from internlm_lite.apps.attention_maps.write_maps import write_maps
    from internlm_lite.generate.decode import generate

    if len(requests) != 1:
        raise ConfigError(f"--attention with {len(requests)} prompts: expected one")
    shape, (request,), path = model.any_stage.config, requests, arguments.attention
    layers = numbers_of("--layers", arguments.layers, max(shape.num_layers, shape.num_encoder_layers))
    heads = numbers_of("--heads", arguments.heads, shape.num_attention_heads)
    if shape.num_encoder_layers:
        (target,) = generate(model, [request], how, tokenizers["prompt"].decode)
        request = replace(request, prompt=[*request.prompt, *target.tokens])
    labels = {
        side: [tokenizer.piece(token) for token in getattr(request, side)] for side, tokenizer in tokenizers.items()
    }
    groups = maps_of(model, replace(request, max_new_tokens=0), labels, layers, heads, path.suffix)
    write_maps(groups, path)
    counts = [f"{len(labels['source'])} source and"] * bool(labels["source"]) + [f"{len(labels['prompt'])} tokens"]
    print(f"{sum(len(maps.names) for maps in groups)} maps of {' '.join(counts)}: {escaped(str(path))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(continue_prompts, arguments), has_s3_option=True)
