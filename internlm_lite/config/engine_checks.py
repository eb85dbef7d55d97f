"""Cross checks of the section `engine`: what DeepSpeed cannot serve is refused, with the reason.

Whether the package is installed, and fits the device, is checked in `optim.deepspeed_settings`.
"""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.keys import known_keys, value_of
from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config

_NAME = "engine.name"
_ALONE = {
    "parallel.tensor": "it splits no layers",
    "parallel.pipeline.size": "its pipeline needs models of its own",
    "parallel.context.size": "its own kind cuts no packed documents",
    "parallel.zero_stage": "engine.stage says it",
    "ema": "its optimizer keeps no average",
    "optimizer.moments": "its optimizer keeps fp32 moments",
    "model.use_fp32_norm": "it stores all weights in one dtype",
    "model.fp8": "its gathers know no float8",
    "model.num_encoder_layers": "its curve beside an encoder has not been compared with ours",
}
"""Keys that DeepSpeed serves with their default alone -> why."""


def engine_problems(config: Config) -> Iterator[Problem]:
    """A Problem for each key that the engine does not read, or that DeepSpeed cannot serve."""
    engine = config.engine
    if engine.name == "native":
        for name in ("stage", "offload", "nvme_path", "overlap"):
            key = f"engine.{name}"
            if (value := value_of(config, key)) != known_keys()[key].get_default():
                text = f'found {shown(value)} with engine.name "native", expected "deepspeed"; set it, or remove this'
                yield Problem((key, _NAME), text)
        return
    for key, why in _ALONE.items():
        value, default = value_of(config, key), known_keys()[key].get_default()
        if value != default:
            found = "dict(...)" if key == "ema" else shown(value)
            yield _refused(key, found, f"expected {shown(default)}, because {why}")
    if config.parallel.zero1 > 0:
        why = "it shards over all data-parallel ranks"
        yield _refused("parallel.zero1", str(config.parallel.zero1), f"expected -1, because {why}")
    if config.optimizer.name != "adamw":
        yield _refused(
            "optimizer.name", shown(config.optimizer.name), 'expected "adamw", the rule that both engines have'
        )
    if config.model.torch_dtype_name not in ("bfloat16", "float32"):
        why = (
            "its loss scale would be a second one beside grad_scaler"
            if "16" in config.model.dtype
            else "its master weights are fp32"
        )
        text = f'expected "torch.bfloat16" or "torch.float32", because {why}'
        yield _refused("model.dtype", shown(config.model.dtype), text)
    if config.hybrid_zero_optimizer.grad_dtype not in (None, "torch.float32"):
        text = "expected None, because gradients are added in fp32"
        yield _refused("hybrid_zero_optimizer.grad_dtype", shown(config.hybrid_zero_optimizer.grad_dtype), text)
    yield from _stage(config)


def _stage(config: Config) -> Iterator[Problem]:
    """What the stages and the kinds of offload ask for."""
    engine = config.engine
    if engine.offload == "nvme" and engine.stage != 3:
        text = (
            f'found "nvme" with engine.stage {engine.stage}, expected stage 3, which alone has it; change one of them'
        )
        yield Problem(("engine.offload", "engine.stage"), text)
    if engine.offload == "nvme" and engine.nvme_path is None:
        yield Problem(("engine.offload", "engine.nvme_path"), 'found "nvme" without engine.nvme_path; set the folder')
    if engine.nvme_path is not None and engine.offload != "nvme":
        text = (
            f'found {shown(engine.nvme_path)} with engine.offload {shown(engine.offload)}, expected "nvme"; remove it'
        )
        yield Problem(("engine.nvme_path", "engine.offload"), text)
    if engine.stage != 3:
        return
    why = "found {} with engine.stage 3: ranks that generate or score alone would wait for the weights of the others"
    for key in ("monitor.sample_prompts", "evaluation.tasks"):
        if value := value_of(config, key):
            text = f"{why.format(shown(value))}; remove it, or take stage 2"
            yield Problem((key, "engine.stage"), text)


def _refused(key: str, found: str, expected: str) -> Problem:
    return Problem((key, _NAME), f'found {found} with engine.name "deepspeed", {expected}; change one of them')
