"""Parts of model families in layouts: a fixed list of runs in which every pair of their values, and every value with
every value of the layout options, meets at least once.

A value is a group of config keys that belong together. Values that the config refuses together do not meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np

from tests.train.layouts import BOUND, FREE, Keys, Layout, bound_choices, build, feasible

RUNS = 128
"""More than the pairs need; the others meet again, in another company."""
_SCALED = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0}


def _keys(**model: Any) -> Keys:
    """Keys of the section `model`."""
    return tuple((f"model.{name}", value) for name, value in model.items())


def _scaled(kind: str) -> Keys:
    return _keys(rope_scaling=tuple({"rope_type": kind, **_SCALED}.items()))


PARTS: dict[str, tuple[Keys, ...]] = {
    "qk_norm": (_keys(), _keys(qk_norm="head"), _keys(qk_norm="full")),
    "norm": (
        _keys(),
        _keys(norm_type="layernorm"),
        _keys(norm_type="layernorm", norm_bias=False, zero_centered_norm=True),
        _keys(zero_centered_norm=True),
    ),
    "norm_position": (_keys(), *(_keys(norm_position=where) for where in ("post", "reordered", "sandwich"))),
    "position": (
        _keys(),
        *(_scaled(kind) for kind in ("linear", "llama3", "yarn", "dynamic")),
        _keys(position="learned", max_position_embeddings=64),
        _keys(position="sinusoidal"),
        _keys(position="none"),
        _keys(no_rope_every=2),
        _keys(partial_rotary_factor=0.5),
    ),
    "mlp": (
        _keys(),
        _keys(mlp_type="geglu"),
        _keys(mlp_type="geglu_tanh", mlp_bias=True),
        _keys(mlp_type="gelu", mlp_bias=True),
        _keys(mlp_type="gelu_tanh"),
        _keys(mlp_type="relu"),
    ),
    "head": (
        _keys(),
        _keys(head_bias=True),
        _keys(logit_softcap=0.7),
        _keys(logit_scale=0.4, head_bias=True, logit_softcap=2.0),
    ),
    "embedding": (_keys(), _keys(embed_scale=5.6)),
    "z_loss": ((), (("loss.z_loss", 0.01),)),
    "window": (
        _keys(),
        _keys(sliding_window=5),
        _keys(sliding_window=9, layer_types=("sliding_attention", "full_attention")),
        _keys(sliding_window=9, layer_types=("full_attention", "sliding_attention"), rope_local_base=50.0),
    ),
    "scores": (_keys(), _keys(attention_softcap=0.5), _keys(attention_scale=0.7)),
}
"""Values of the parts of a model; the first is the default."""
DROPOUT = _keys(embedding_dropout=0.1, residual_dropout=0.2, attention_dropout=0.1)
"""In every second run."""
OLD = {name: FREE.get(name) or BOUND[name] for name in (*BOUND, *FREE) if name not in ("rows", "fp32_norm")}
"""Options of layouts, whose values meet those of every part."""
OPTIONS: dict[str, tuple[Any, ...]] = {**OLD, **PARTS}

End = tuple[str, Any]
"""An option and one of its values."""


def with_parts(layout: Layout, parts: dict[str, Keys], *, dropout: bool) -> Layout:
    return replace(layout, keys=sum(parts.values(), DROPOUT if dropout else ()))


def wanted_pairs() -> set[tuple[End, End]]:
    """A value of a part with one of another option, where the trainer accepts both in some layout."""
    found = set()
    for one, other in combinations(OPTIONS, 2):
        if other in PARTS:
            for a, b in product(OPTIONS[one], OPTIONS[other]):
                if _stand_together(one, a, other, b):
                    found.add(((one, a), (other, b)))
    return found


def _stand_together(one: str, a: Any, other: str, b: Keys) -> bool:
    if one in PARTS:
        return feasible(with_parts(Layout(), {one: a, other: b}, dropout=False))
    return any(feasible(with_parts(layout, {other: b}, dropout=False)) for layout in _first_with(one, a))


def _first_with(name: str, value: Any) -> list[Layout]:
    """The smallest layout with this value of an old option."""
    if name in FREE:
        return [Layout(**{name: value})]
    of = [values for values in bound_choices() if values[list(BOUND).index(name)] == value]
    return [build(dict(zip(BOUND, min(of, key=lambda values: np.prod(values[:3])), strict=True)))]


@cache
def family_layouts() -> tuple[Layout, ...]:
    """By size of their world."""
    return tuple(sorted(_drawn(), key=lambda layout: layout.world))


def ends_of(layout: Layout) -> list[End]:
    """The value of every option; of a part, the one all of whose keys the layout has."""
    has = set(layout.keys)
    parts = [(name, max((keys for keys in PARTS[name] if has >= set(keys)), key=len)) for name in PARTS]
    return [*((name, getattr(layout, name)) for name in OLD), *parts]


def _drawn() -> Iterator[Layout]:
    """Greedy: a pair is worth 1, and a quarter as much each time it has met; large worlds cost more than small ones."""
    numbers = {end: i for i, end in enumerate((name, value) for name, values in OPTIONS.items() for value in values)}
    worth = np.zeros((len(numbers),) * 2)
    for pair in wanted_pairs():
        a, b = (numbers[end] for end in pair)
        worth[a, b] = worth[b, a] = 1
    choices = np.array(
        [[numbers[end] for end in zip(BOUND, values, strict=True) if end in numbers] for values in bound_choices()]
    )
    ranks = np.array([np.prod(values[:3]) for values in bound_choices()])
    for run in range(RUNS):
        best = int(np.argmax(worth.sum(1)[choices].sum(1) / ranks**0.5))
        layout = build(dict(zip(BOUND, bound_choices()[best], strict=True)))
        taken, parts = choices[best].tolist(), dict[str, Keys]()
        free = [name for name in OPTIONS if name not in BOUND]
        for name in free[run % len(free) :] + free[: run % len(free)]:
            of = [numbers[name, value] for value in OPTIONS[name]]
            order = np.lexsort((-worth[of].sum(1), -worth[np.ix_(of, taken)].sum(1)))
            for value in (OPTIONS[name][i] for i in order):
                trial = {**parts, name: value} if name in PARTS else parts
                changed = layout if name in PARTS else replace(layout, **{name: value})
                if feasible(with_parts(changed, trial, dropout=False)):
                    layout, parts = changed, trial
                    taken.append(numbers[name, value])
                    break
        for pair in combinations(taken, 2):
            worth[pair] /= 4
            worth[pair[::-1]] /= 4
        yield with_parts(layout, parts, dropout=run % 2 == 1)
