"""Evaluate a checkpoint: loss, accuracy, perplexity and bits per byte on validation data, and tasks.

    internlm-lite evaluate --checkpoint demo/ckpts
    internlm-lite evaluate --checkpoint demo/ckpts --tasks cloze_word,cloze_sentence --output figures.json
    internlm-lite evaluate --checkpoint de_en/ckpts --tasks pairs --pairs text/test de en --beams 4
    internlm-lite evaluate --checkpoint demo/ckpts --tasks lambada_openai,hellaswag --limit 500 --weights both
    torchrun --nproc_per_node=8 tools/evaluate.py --checkpoint ckpts parallel.tensor=4

The config is the one in the checkpoint, without its training data and with all of its data.valid_folder;
section.key=value changes it. Its layout is taken if it fits the number of processes, else they are all data parallel.
Tasks that are not built in come from lm-evaluation-harness: pip install internlm_lite[eval]. BLEU and chrF of pairs
need sacrebleu: pip install internlm_lite[bleu].
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lite.cli.options import add_config, add_device, add_launcher, check_at_least, new_parser, s3_settings
from internlm_lite.runtime.dist_env import adopt_s3_keys, check_options, read_dist_env, set_defaults, set_gpu_defaults
from internlm_lite.runtime.tool import add_s3_option, run_tool

if TYPE_CHECKING:
    from internlm_lite.checkpoint.format.catalog import Found
    from internlm_lite.checkpoint.format.weight_roles import Weights
    from internlm_lite.config.load import LoadedConfig
    from internlm_lite.config.schema import Config

_SECONDS = 600


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FOLDER", help="save folder (its newest), FOLDER/STEP, one checkpoint")
    add_config(parser, required=False, text="config file (default: the config in the checkpoint)")
    add("--tasks", metavar="NAME,NAME", help="tasks (default: the config's evaluation.tasks); none: no tasks")
    add("--limit", type=int, metavar="N", help="examples per task (all; 200 of a cloze task)")
    add("--num-fewshot", type=int, metavar="N", help="examples in a prompt of lm_eval's tasks (as each says)")
    text = 'the text that the task "pairs" of an encoder-decoder is scored on: evaluation.pairs_folder, .pairs_sides'
    add("--pairs", nargs=3, metavar=("FOLDER", "SOURCE", "TARGET"), help=text)
    add("--beams", type=int, metavar="K", help="of that task (greedy): evaluation.beams")
    add("--include-path", metavar="FOLDER", help="folder of task files in lm_eval's form")
    add("--weights", choices=["model", "ema", "both"], default="model", help="trained or averaged weights (model)")
    add("--output", type=Path, metavar="FILE", help="write the figures as JSON, too")
    add("--log-style", choices=["auto", "full", "compact"], default="auto", help="lines on the terminal")
    add_device(parser)
    add_launcher(parser, timeout=_SECONDS)
    add_s3_option(parser)
    arguments = parser.parse_intermixed_args(argv)
    check_at_least(parser, arguments, limit=1, num_fewshot=0, beams=1)
    return arguments


def evaluate(arguments: argparse.Namespace) -> int:
    """Ends the process; returns only if an error is raised before it begins."""
    from internlm_lite.config.load import check_config
    from internlm_lite.errors import ConfigError, InternLMError
    from internlm_lite.runtime.device import usable_gpus
    from internlm_lite.runtime.torchrun import write_agent_error
    from internlm_lite.train.evaluation import CheckpointEvaluation
    from internlm_lite.train.job import Options, run_job

    set_defaults(os.environ)
    adopt_s3_keys(os.environ)
    dist_env = read_dist_env(os.environ, arguments.launcher, arguments.host, arguments.port)
    check_options(dist_env, rank=arguments.rank, local_rank=arguments.local_rank, world_size=arguments.world_size)
    try:
        loaded = loaded_config(arguments, dist_env.world_size)
        check_config(loaded, dist_env.world_size)
    except InternLMError as error:
        write_agent_error(dist_env.error_file, f"{type(error).__name__}: {error}")
        if dist_env.rank and isinstance(error, ConfigError):  # rank 0 says the same
            return error.exit_code
        raise
    if usable_gpus(arguments.device):
        set_gpu_defaults(os.environ, deterministic=loaded.config.deterministic)
    weights: dict[str, tuple[Weights, ...]] = {"model": ("model",), "ema": ("ema",), "both": ("model", "ema")}
    options = Options(
        resume="none",
        device=arguments.device,
        run_dir=Path("RUN"),
        timeout_seconds=arguments.timeout,
        log_style=arguments.log_style,
        command=tuple(sys.argv),
        profiling=False,
        evaluation=CheckpointEvaluation(weights[arguments.weights], arguments.output),
    )
    run_job(loaded, dist_env, options)


def loaded_config(arguments: argparse.Namespace, world_size: int) -> LoadedConfig:
    """The config to evaluate with. Raises ConfigError, CheckpointError."""
    from internlm_lite.checkpoint.load.checkpoint_loader import Loader
    from internlm_lite.config.load import config_from, load_config
    from internlm_lite.config.overrides import COMMAND_LINE
    from internlm_lite.errors import ConfigError
    from internlm_lite.mesh.mesh import single_process_mesh
    from internlm_lite.train.evaluation import config_to_evaluate

    overrides = [*arguments.overrides]
    opened = Loader(single_process_mesh(), s3=s3_settings(arguments.s3)).open
    if arguments.config is not None:
        loaded = load_config(arguments.config, overrides)
        if loaded.config.stages:
            by_hand = loaded.origins["model.rope_base"] == COMMAND_LINE
            config = loaded.config if by_hand else _rotated(loaded.config, opened(arguments.checkpoint))
            loaded = replace(loaded, config=config.model_copy(update={"stages": []}))
    else:
        found = opened(arguments.checkpoint)
        saved = without_layout(_rotated(found.config(), found), world_size)
        loaded = config_from(saved, Path(found.manifest_path), overrides)
    config = loaded.config
    asked = {
        "tasks": None if arguments.tasks is None else [name for name in arguments.tasks.split(",") if name != "none"],
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "include_path": arguments.include_path,
        "beams": arguments.beams,
        "pairs_folder": arguments.pairs and arguments.pairs[0],
        "pairs_sides": arguments.pairs and arguments.pairs[1:],
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    evaluation = config.evaluation.model_copy(update=asked)
    if not evaluation.tasks:  # keys that say how tasks are evaluated
        evaluation = type(evaluation)()
    batches = config.data.valid_batches if loaded.origins["data.valid_batches"] == COMMAND_LINE else None
    config = config.model_copy(update={"evaluation": evaluation})
    config = config_to_evaluate(config, arguments.checkpoint, batches)
    if arguments.s3:
        config = config.model_copy(update={"ckpt": config.ckpt.model_copy(update={"s3": s3_settings(arguments.s3)})})
    if not evaluation.tasks and config.data.valid_folder is None:
        raise ConfigError(
            "found neither data.valid_folder nor tasks, expected something to evaluate on; add "
            "data.valid_folder=FOLDER, or --tasks NAME,NAME"
        )
    return replace(loaded, config=config)


def _rotated(config: Config, found: Found) -> Config:
    """`config` with the rotary base of the stage in which the checkpoint was saved, and the lengths of all evaluations
    of its run."""
    return config.model_copy(update={"model": found.in_its_stage(config).model, "stages": []})


def without_layout(config: Config, world_size: int) -> Config:
    """The config with its layout if the processes fit it, else without: all processes data parallel."""
    from internlm_lite.config.schema import ParallelConfig

    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline.size
    if world_size % ranks == 0:
        fitting = parallel.model_copy(update={"zero1": -1})
        return config.model_copy(update={"parallel": fitting})
    model = config.model.model_copy(update={"num_chunks": 1})
    return config.model_copy(update={"parallel": ParallelConfig(), "model": model})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of an error before the evaluation begins, which then ends the process itself: 0 done, 2 bad input, 6
    storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(evaluate, arguments), "interrupted before the start")
