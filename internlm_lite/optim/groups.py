"""Parameter groups: which update rule a parameter has, and with which learning rate, weight decay and betas.

A parameter is in exactly one group, found from its own properties (shape, `looked_up`) and from `optimizer.groups`,
whose patterns the user writes. A group becomes one instance of its rule on each rank (`optim.updates`), and a bucket
holds parameters of one group (`optim.buckets`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from internlm_lite.config.schema import Config, GroupConfig, OptimizerConfig
from internlm_lite.errors import ConfigError
from internlm_lite.mesh.layout import Parameter
from internlm_lite.units import human_count

_NEAR = 3
"""Names shown for a pattern that matches none."""
_DECAYS: dict[str, Callable[[Parameter], bool]] = {
    "matrices": lambda param: param.dim() > 1,
    "matrices_without_embeddings": lambda param: param.dim() > 1 and not param.looked_up,
    "all": lambda param: True,
}
"""adam.weight_decay_on of the config -> whether weight decay applies to a parameter."""


@dataclass(frozen=True)
class ParamGroup:
    """Hyperparameters that all parameters of a group share; groups are equal if these are."""

    name: str
    rule: str
    """Key of `rules.RULES`."""
    lr: float
    """Peak learning rate; the schedule of adam.lr, scaled."""
    weight_decay: float
    beta1: float
    beta2: float | None
    """None: by beta2_scheduler."""
    eps: float
    momentum: float
    options: OptimizerConfig = field(compare=False)
    """Further keys of the rule, the same for all groups."""

    @property
    def averages(self) -> str:
        """How long its averages are: momentum, or both betas."""
        if self.rule in ("sgd", "muon"):
            return f"momentum {self.momentum:g}"
        return f"betas {self.beta1:g}, {'by step' if self.beta2 is None else format(self.beta2, 'g')}"

    def text(self) -> str:
        return f"{self.rule}, lr {self.lr:g}, weight decay {self.weight_decay:g}, {self.averages}"


class ParamGroups:
    """The groups of a config."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._decays = _DECAYS[config.adam.weight_decay_on]

    def of(self, param: Parameter) -> ParamGroup:
        """The group of this parameter; equal for the parts and copies of one tensor on all ranks."""
        group = self._by_role(param)
        given = self.given(param.shard_spec.name)
        if given is None:
            return group
        if given.betas and group.rule == "muon":
            raise ConfigError(
                f"optimizer.groups: {given.pattern!r} has betas and matches {param.shard_spec.name}, a matrix of Muon, "
                "which has a momentum instead; leave betas out, or write a pattern that matches other names"
            )
        beta1, beta2 = given.betas or (group.beta1, group.beta2)
        wider = self._wider(param)
        return replace(
            group,
            name=f"{given.pattern} ({group.name})",
            lr=group.lr if given.lr is None else given.lr / wider,
            weight_decay=group.weight_decay if given.weight_decay is None else given.weight_decay * wider,
            beta1=beta1,
            beta2=beta2,
        )

    def given(self, name: str) -> GroupConfig | None:
        """The first of `optimizer.groups` that matches the name of a parameter."""
        return next((one for one in self._config.optimizer.groups if fnmatchcase(name, one.pattern)), None)

    def _by_role(self, param: Parameter) -> ParamGroup:
        """The group without `optimizer.groups`."""
        adam, options = self._config.adam, self._config.optimizer
        if options.name == "muon" and param.matrix_rows is not None:
            return self._muon
        decays, wider = self._decays(param), self._wider(param)
        return ParamGroup(
            name="hidden" if wider != 1 else "decay" if decays else "no_decay",
            rule="adamw" if options.name == "muon" else options.name,
            lr=adam.lr / wider,
            weight_decay=adam.weight_decay * wider if decays else 0.0,
            beta1=adam.adam_beta1,
            beta2=None,
            eps=adam.adam_eps,
            momentum=options.momentum or 0.0,
            options=options,
        )

    def _wider(self, param: Parameter) -> float:
        """By what mu-P divides a learning rate and multiplies a weight decay: an elementwise update of a block's matrix
        is as large as its learning rate, whatever the gradient. Muon's is as large as the matrix wants it."""
        by_element = param.matrix_rows is not None and self._config.optimizer.name != "muon"
        return self._config.model.width_multiplier if by_element else 1.0

    @property
    def _muon(self) -> ParamGroup:
        adam, options = self._config.adam, self._config.optimizer
        decay = options.muon_weight_decay
        return ParamGroup(
            name="muon",
            rule="muon",
            lr=adam.lr if options.muon_lr is None else options.muon_lr,
            weight_decay=adam.weight_decay if decay is None else decay,
            beta1=adam.adam_beta1,
            beta2=None,
            eps=adam.adam_eps,
            momentum=0.95 if options.momentum is None else options.momentum,
            options=options,
        )


def check_patterns(config: Config, names: Sequence[str]) -> None:
    """Raises ConfigError if one of `optimizer.groups` has no parameter. `names`: of all parameters of the model."""
    left = list(names)
    for index, one in enumerate(config.optimizer.groups):
        matched, before = ([name for name in some if fnmatchcase(name, one.pattern)] for some in (left, names))
        left = [name for name in left if name not in matched]
        key = f"optimizer.groups[{index}].pattern"
        if matched:
            continue
        if before:
            raise ConfigError(
                f"{key}: {one.pattern!r} has no parameter left, patterns before it take {before[0]}"
                f"{f' and {len(before) - 1} more' if before[1:] else ''}; the first pattern that matches wins: write "
                "the narrower one first, or leave this one out"
            )
        raise ConfigError(
            f"{key}: {one.pattern!r} matches no parameter, expected a pattern of whole names; near names: "
            f"{', '.join(_near(one.pattern, names))}"
        )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Names of layer 0 and outside layers, the most similar first."""
    one_layer = [name for name in names if not re.match(r"layers\.[1-9]", name)]
    return sorted(one_layer, key=lambda name: -SequenceMatcher(None, pattern, name).ratio())[:_NEAR]


def group_lines(config: Config, params: Iterable[Parameter]) -> list[str]:
    """A line for each group that there is among `params`, all parameters of the model."""
    groups = ParamGroups(config)
    members: dict[ParamGroup, list[int]] = {}
    for param in params:
        members.setdefault(groups.of(param), []).append(math.prod(param.shard_spec.shape))
    return [
        f"group {group.name}: {group.text()}; {human_count(sum(sizes))} parameters in {len(sizes)} tensors"
        for group, sizes in members.items()
    ]
