"""What the loop, checkpoints and checks need of an optimizer: `zero.HybridZeroOptimizer`, or DeepSpeed's behind
`deepspeed_engine.DeepSpeedOptimizer`. What the methods do is said at the former's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from internlm_lite.mesh.layout import LocalShard
from internlm_lite.optim.average import WeightAverage
from internlm_lite.optim.buckets import BucketSpec
from internlm_lite.optim.grad_norm import Requests
from internlm_lite.optim.scaler import LossScaler
from internlm_lite.optim.step_decision import StepOutcome


class HeldWeights(Protocol):
    """Weights that ranks hold copies of."""

    @property
    def kind(self) -> BucketSpec: ...

    @property
    def weights(self) -> torch.Tensor: ...

    @property
    def has_weights(self) -> bool: ...


class TrainingOptimizer(Protocol):
    """The interface of an optimizer."""

    before_exchange: Callable[[], object]

    @property
    def average(self) -> WeightAverage | None: ...

    @property
    def scaler(self) -> LossScaler: ...

    @property
    def loss_scale(self) -> torch.Tensor: ...

    def begin(self, micro_num: int) -> None: ...

    def step(
        self,
        index: int,
        num_labels: int,
        global_tokens: int,
        requests: Requests = ...,
        loss_sum: torch.Tensor | float = ...,
    ) -> StepOutcome: ...

    def to_draw(self) -> Iterator[Sequence[nn.Module]]: ...

    def whole_weights(self) -> AbstractContextManager[None]: ...

    def wait_weights(self) -> None: ...

    def restart_average(self) -> None: ...

    def averaged(self) -> AbstractContextManager[None]: ...

    def publish_weights(self) -> None: ...

    def shards(self) -> Iterator[tuple[HeldWeights, dict[str, torch.Tensor]]]: ...

    def pieces(self) -> Iterator[LocalShard]: ...

    def problem(self) -> str | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], *, moments: bool, averages: bool = ...) -> None: ...

    def elements_on_zero_ranks(self) -> list[int]: ...
