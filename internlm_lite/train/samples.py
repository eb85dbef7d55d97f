"""At the end of a run: what the model makes of the config's prompts."""

from __future__ import annotations

import logging
from pathlib import Path

from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.generate.generate import generate
from internlm_lite.generate.sample import Sampling
from internlm_lite.models.stages import whole_model
from internlm_lite.monitor.jsonl import JsonlWriter
from internlm_lite.train.build import Run

logger = logging.getLogger("internlm_lite")

SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=1)


def show_samples(run: Run) -> None:
    """Continue `monitor.sample_prompts`; rank 0 prints them and appends to samples.jsonl. Collective."""
    monitor = run.config.monitor
    run.optimizer.wait_weights()
    if not monitor.sample_prompts or run.config.data.tokenizer is None or run.mesh.dp.rank != 0:
        return
    tokenizer = Tokenizer(Path(run.config.data.tokenizer))
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = [start + tokenizer.encode(text) for text in monitor.sample_prompts]
    model = whole_model(run.config, run.mesh, run.stages)
    continued = generate(model, prompts, monitor.sample_tokens, SAMPLING, tokenizer.eos)
    if not run.mesh.is_main:
        return
    writer = JsonlWriter(run.folder / "samples.jsonl")
    for prompt, tokens in zip(monitor.sample_prompts, continued, strict=True):
        text = tokenizer.decode(tokens)
        logger.info(f"sample: {prompt!r} -> {text!r}")
        writer.write({"step": run.config.data.total_steps, "prompt": prompt, "text": text})
    writer.close()
