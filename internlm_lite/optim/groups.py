"""Parameter groups: which update rule a parameter has, and with which learning rate, weight decay and betas.

A parameter is in exactly one group, found from its own properties (shape, `looked_up`); a group becomes one instance of
its rule on each rank (`optim.updates`), and buckets hold parameters of one group (`optim.buckets`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internlm_lite.config.schema import Config, OptimizerConfig
from internlm_lite.mesh.layout import Parameter

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
    options: OptimizerConfig
    """Further keys of the rule."""


class ParamGroups:
    """The groups of a config."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._decays = _DECAYS[config.adam.weight_decay_on]

    def of(self, param: Parameter) -> ParamGroup:
        """The group of this parameter; equal for the parts of one tensor on all ranks."""
        adam, options = self._config.adam, self._config.optimizer
        if options.name == "muon" and param.matrix_rows is not None:
            return self._muon
        decays = self._decays(param)
        # Of mu-P; the update of a block's matrix is as large as its learning rate, whatever the gradient.
        wider = self._config.model.width_multiplier if param.matrix_rows is not None else 1.0
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
