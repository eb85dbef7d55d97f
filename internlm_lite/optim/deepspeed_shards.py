"""Where DeepSpeed keeps this rank's part of master weights, state and gradients, as flat tensors.

    stages 1, 2    a flat fp32 tensor for each group of parameters, which lie in it end to end: cut anywhere
    stage 3        a flat fp32 tensor for each sub-group; every parameter is cut into as many parts as there are ranks,
                   of equal size, padded at the end
    NVMe           the same, in files, read into memory one sub-group at a time

These are DeepSpeed's internals, of 0.19: its own checkpoints, and `deepspeed.utils.safe_get_*`, read them likewise. All
that this package knows of them is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.mesh.layout import Parameter

ROLES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FlatPart:
    """Elements start..start+numel-1 of flat tensor `flat` are elements first.. of `param`, in row-major order."""

    param: Parameter
    flat: int
    start: int
    numel: int
    first: int


class DeepSpeedShards:
    """This rank's flat tensors. `zero`: the optimizer that DeepSpeed's engine made."""

    parts: list[FlatPart]

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.rule: torch.optim.Optimizer = zero.optimizer
        """torch's optimizer, whose state is that of the flat tensors."""

    def flats(self) -> list[torch.Tensor]:
        """Master weights, fp32."""
        raise NotImplementedError

    @property
    def groups(self) -> list[int]:
        """The parameter group of each flat tensor."""
        raise NotImplementedError

    def weights(self, group: int) -> torch.Tensor:
        """The weights of a group that every rank holds whole; empty: none."""
        raise NotImplementedError

    def in_file(self, flat: int) -> bool:
        """Whether a flat tensor is in memory only inside `present`."""
        return False

    def gradients(self) -> list[torch.Tensor]:
        """After the last backward pass of a step: the mean over all ranks, in parts."""
        raise NotImplementedError

    def square_sum(self, device: torch.device) -> torch.Tensor:
        """fp64: of the squares of `gradients`."""
        squares = [torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in self.gradients()]
        return torch.stack(squares).sum().to(device)

    def publish(self) -> None:
        """Copy master weights to the model's weights on every rank. Collective."""
        raise NotImplementedError

    def adopt(self) -> None:
        """Copy the model's weights to the master weights."""
        self._zero.refresh_fp32_params()

    def allocate(self) -> None:
        """Make the state, which DeepSpeed leaves to the first update: zeros, and no update counted."""
        for flat in self.flats():
            self._fill(flat)

    def _fill(self, flat: torch.Tensor) -> None:
        self.rule.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{role: torch.zeros_like(flat, requires_grad=False) for role in ROLES},
        }

    @contextmanager
    def present(self, flat: int) -> Iterator[dict[str, torch.Tensor]]:
        """{role: tensor} of a flat tensor: its own memory, of which changes are kept."""
        weights = self.flats()[flat]
        yield {"master": weights.detach(), **{role: self.rule.state[weights][role] for role in ROLES}}

    def steps(self) -> list[torch.Tensor]:
        """The number of updates, of each flat tensor."""
        return [self.rule.state[flat]["step"] for flat in self.flats()]


class FragmentShards(DeepSpeedShards):
    """Stages 1 and 2, for which DeepSpeed writes on each parameter where it lies."""

    def __init__(self, zero: Any, params: Sequence[Parameter]) -> None:
        super().__init__(zero)
        self.parts = []
        for param in params:
            lies: Any = param._hp_mapping  # type: ignore[attr-defined]
            if lies is not None:
                within, of = lies.hp_fragment_address, lies.lp_fragment_address
                self.parts.append(FlatPart(param, lies.param_group_index, within.start, within.numel, of.start))

    def flats(self) -> list[torch.Tensor]:
        return [group["params"][0] for group in self.rule.param_groups]

    @property
    def groups(self) -> list[int]:
        return list(range(len(self.rule.param_groups)))

    def weights(self, group: int) -> torch.Tensor:
        zero = self._zero
        found: torch.Tensor = (zero.bf16_groups_flat if hasattr(zero, "bf16_groups_flat") else zero.bit16_groups_flat)[
            group
        ]
        return found

    def gradients(self) -> list[torch.Tensor]:
        zero = self._zero
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # stage 1 of a bf16 model
            return list(zero.fp32_groups_gradient_flat_partition)
        if zero.cpu_offload:
            return [flat.grad for flat in self.flats() if flat.grad is not None]
        return [grad for grads in zero.averaged_gradients.values() for grad in grads]

    def publish(self) -> None:
        self._zero.update_lp_params()


class PartitionedShards(DeepSpeedShards):
    """Stage 3."""

    def __init__(self, zero: Any, params: Sequence[Parameter], rank: int) -> None:
        super().__init__(zero)
        self.parts = []
        for param in params:
            flat, start, size = zero.grad_position[zero.get_param_id(param)]
            n_elements: int = param.ds_numel  # type: ignore[attr-defined]
            mine = min(size, n_elements - rank * size)
            if mine > 0:
                self.parts.append(FlatPart(param, flat, start, mine, rank * size))

    def flats(self) -> list[torch.Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    @property
    def groups(self) -> list[int]:
        return [self._zero.sub_group_to_group_id[flat] for flat in range(len(self.flats()))]

    def weights(self, group: int) -> torch.Tensor:
        return torch.empty(0)

    def in_file(self, flat: int) -> bool:
        return bool(self._zero._swappable_optimizer_subgroup(flat))

    def gradients(self) -> list[torch.Tensor]:
        if self._zero.offload_optimizer:
            return [flat.grad for n, flat in enumerate(self.flats()) if flat.grad is not None and not self.in_file(n)]
        return [grad for grads in self._zero.averaged_gradients.values() for grad in grads]

    def square_sum(self, device: torch.device) -> torch.Tensor:
        if not self._zero.swap_optimizer:
            return super().square_sum(device)
        # Gradients of files are in files; DeepSpeed took their norms on the way there.
        norms = [torch.as_tensor(norm, dtype=torch.float64).to(device) for norm in self._norms()]
        return torch.stack(norms).square().sum()

    def _norms(self) -> list[Any]:
        found = self._zero.norm_for_param_grads
        return [found[key] for part in self.parts if (key := self._zero.get_param_id(part.param)) in found]

    def publish(self) -> None:
        zero = self._zero
        for flat in range(len(self.flats())):
            with self.present(flat):
                zero._reassign_or_swap_out_partitioned_parameters(flat)
        zero.parameter_offload.partition_all_parameters()

    def adopt(self) -> None:
        for flat, weights in enumerate(self._zero.fp16_partitioned_groups_flat):
            with self.present(flat) as tensors:
                tensors["master"].copy_(weights)

    def allocate(self) -> None:
        for flat, weights in enumerate(self.flats()):
            with self._read(flat):
                self._fill(weights)

    @contextmanager
    def _read(self, flat: int) -> Iterator[None]:
        """Of a file: read before the block, and written after it."""
        if not self.in_file(flat):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(flat)
        try:
            yield
        finally:
            self._zero._optimizer_states_and_gradient_swap_out(flat)

    @contextmanager
    def present(self, flat: int) -> Iterator[dict[str, torch.Tensor]]:
        with self._read(flat), super().present(flat) as tensors:
            yield tensors


def shards_of(zero: Any, params: Sequence[Parameter], stage: int, rank: int) -> DeepSpeedShards:
    """Of the optimizer that DeepSpeed made for this stage; `rank`: this one's among those that share the state."""
    return PartitionedShards(zero, params, rank) if stage == 3 else FragmentShards(zero, params)
