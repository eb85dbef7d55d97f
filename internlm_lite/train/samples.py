"""Continues the config's prompts during training and at its end; an encoder-decoder translates them.

This does not change training: no gradients, a separate random generator, no copy of the weights. Only the first
data-parallel rank (with its tp and pp ranks) generates, unless they have to do it together (`WholeModel.together`).
"""

from __future__ import annotations

from pathlib import Path

from internlm_lite.config.schema import Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import InternLMError
from internlm_lite.generate.decode import check, generate
from internlm_lite.generate.prompts import Defaults, PromptLine, end_ids
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling
from internlm_lite.mesh import comm
from internlm_lite.models.stages import WholeModel
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.trainer import Trainer

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
SEED = 1


class Samples:
    """Continues `monitor.sample_prompts`; rank 0 reports the text."""

    def __init__(self, config: Config, trainer: Trainer, reporter: Reporter, model: WholeModel) -> None:
        """Collective. Raises DataError on all ranks if the tokenizer cannot be loaded or a prompt is invalid."""
        self._monitor, self._total_steps, self._mesh = config.monitor, config.data.total_steps, trainer.mesh
        self._optimizer, self._reporter = trainer.optimizer, reporter
        self._model = model
        self._tokenizer: Tokenizer | None = None
        self._requests: list[Request] = []
        self._sampling = Sampling(temperature=0) if config.model.num_encoder_layers else SAMPLING
        if config.monitor.sample_prompts and config.data.tokenizer is not None:
            self._agree_on_prompts(Path(config.data.tokenizer), config.data.source_tokenizer)

    def _agree_on_prompts(self, tokenizer: Path, of_sources: str | None) -> None:
        """Rank 0 encodes the prompts for all ranks, because their tokenizer files may differ."""
        agreed: object = None
        if self._mesh.is_main:
            try:
                self._tokenizer = Tokenizer(tokenizer)
                agreed = self._encode(self._tokenizer, None if of_sources is None else Tokenizer(Path(of_sources)))
            except InternLMError as error:
                agreed = error
        agreed = comm.broadcast_object(agreed, self._mesh.world)
        if isinstance(agreed, InternLMError):
            raise agreed
        assert isinstance(agreed, list)
        self._requests = agreed

    def _encode(self, tokenizer: Tokenizer, of_sources: Tokenizer | None) -> list[Request]:
        key = "source" if self._model.any_stage.config.num_encoder_layers else "prompt"
        lines = [PromptLine.model_validate({key: text}) for text in self._monitor.sample_prompts]
        defaults = Defaults(self._monitor.sample_tokens, end_ids(tokenizer), (), SEED)
        requests = [defaults.request(line, tokenizer, of_sources) for line in lines]
        check(self._model, requests)
        return requests

    def due(self, steps_done: int, *, ended_epoch: bool) -> bool:
        """Whether samples are due after `steps_done` steps; False after the last step, which always has them."""
        every = self._monitor.sample_every
        now = ended_epoch if every == "epoch" else bool(every) and steps_done % every == 0
        return bool(self._requests) and now and steps_done < self._total_steps

    def show(self, steps_done: int) -> None:
        """Continue every prompt; print it and append it to samples.jsonl on rank 0. Collective."""
        if not self._requests:
            return
        self._optimizer.wait_weights()
        if self._mesh.dp.rank != 0 and not self._model.together:
            return
        decode = None if self._tokenizer is None else self._tokenizer.decode
        continued = generate(self._model, self._requests, self._sampling, decode)
        if self._mesh.is_main:
            for prompt, continuation in zip(self._monitor.sample_prompts, continued, strict=True):
                self._reporter.sample(steps_done, prompt, continuation.text)
