"""The built-in task "pairs": what an encoder-decoder makes of the sources of a test set, compared with its targets by
sacrebleu (https://github.com/mjpost/sacrebleu), with that package's defaults.

bleu   corpus BLEU (Papineni et al., ACL 2002), 0 to 100, with the tokenizer that it has for the targets' language
chrf   corpus chrF2 (Popovic, WMT 2015), 0 to 100

The package is imported here alone, where the task is asked for.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.data.text import TextOptions, find_text, read_documents
from internlm_lite.data.text_files import Tally
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.data.vocabulary import VocabularySide, check_vocabulary
from internlm_lite.errors import DataError, MissingPackageError, first_line
from internlm_lite.evaluate.scorer import Scorer
from internlm_lite.generate.beams import Beams
from internlm_lite.generate.prompts import end_ids, source_ids
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling

logger = logging.getLogger("internlm_lite")

PAIRS = "pairs"
PAIR_FIGURES = {"bleu": True, "chrf": True}
"""Metric -> whether more is better."""


def require_sacrebleu() -> None:
    """Raises MissingPackageError without the package."""
    if find_spec("sacrebleu") is None:
        raise MissingPackageError(
            f'evaluation.tasks: "{PAIRS}" needs sacrebleu, which is not installed: pip install internlm_lite[bleu]'
        )


class PairTask:
    """For rank 0."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        """`tokenizer`: of the targets. Raises DataError for pairs that cannot be read or encoded, MissingPackageError
        without sacrebleu."""
        require_sacrebleu()
        asked, data, model = config.evaluation, config.data, config.model
        path = data.source_tokenizer or data.tokenizer
        assert asked.pairs_folder is not None and path is not None, "checked with the config"
        self._metrics = _metrics_of(asked.pairs_sides[1])
        self._how = Sampling(temperature=0) if asked.beams == 1 else Beams(asked.beams, asked.length_penalty)
        check_vocabulary([], VocabularySide("", model.vocab_size, data.tokenizer), log=False)
        check_vocabulary([], VocabularySide("source_", model.source_vocab, path), log=False)
        if tokenizer.bos is None:
            raise DataError(f"tokenizer {tokenizer.path}: found no bos token, expected one, with which targets begin")
        pairs = _read(Path(asked.pairs_folder), tuple(asked.pairs_sides), asked.limit)
        self._references = [target for _, target in pairs]
        wanted = [asked.max_tokens or own for own in (data.source_seq_len or data.seq_len, data.seq_len)]
        longest, longest_target = (min(tokens, model.most_positions or tokens) for tokens in wanted)
        of_sources = Tokenizer(Path(path))
        sources = [source_ids(of_sources, source) for source, _ in pairs]
        if cut := sum(len(ids) > longest for ids in sources):
            logger.warning(f"{PAIRS}: {cut} of {len(sources)} sources have more than {longest} tokens and are cut")
        fitting = [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in sources]
        count, ends = max(1, longest_target - 1), end_ids(tokenizer)  # the begin mark has a position, too
        self._requests = [Request([tokenizer.bos], count, ends, source=ids) for ids in fitting]

    def scores(self, scorer: Scorer) -> dict[str, float]:
        """Metric -> value. Inside `Scorer.lead`."""
        texts = scorer.generate(self._requests, self._how)
        found = {name: metric.corpus_score(texts, [self._references]).score for name, metric in self._metrics.items()}
        signatures = "; ".join(f"{name} {metric.get_signature()}" for name, metric in self._metrics.items())
        logger.info(f"{PAIRS}: {len(texts)} pairs; {signatures}")
        return found


def _read(folder: Path, sides: tuple[str, ...], limit: int | None) -> list[tuple[str, str]]:
    options = TextOptions(sides=sides)
    tally = Tally(options.max_bad)
    documents = (pair for file in find_text(folder, options, tally) for pair in read_documents(file, options, tally))
    pairs = [(pair.prompt, pair.text) for pair in islice(documents, limit)]
    for line in tally.lines():
        logger.warning(f"evaluation.pairs_folder: {line}")
    if not pairs:
        raise DataError(f"evaluation.pairs_folder: found no pair in {folder}, expected some; correct the path")
    return pairs


def _metrics_of(language: str) -> dict[str, Any]:
    """Raises MissingPackageError for a language whose words need one more package, such as Japanese."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    try:
        return {"bleu": BLEU(trg_lang=language, force=True), "chrf": CHRF()}
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(f"evaluation.pairs_sides: {language}: sacrebleu says: {first_line(error)}") from None
