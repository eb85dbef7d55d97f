"""mu-P: what each kind of parameter gets, and the coordinate check: activations as large at every width.

Coordinate check: arXiv:2203.03466, appendix D.1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm_lite.config.schema import Config, LossConfig, ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import Transformer, build_model
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import meta_model
from internlm_lite.optim.groups import ParamGroups
from internlm_lite.optim.zero import HybridZeroOptimizer

WIDTHS = (64, 128, 256, 512, 1024)
MUON = {"name": "muon", "update_scale": "spectral", "muon_lr": 0.01}
VOCAB, TOKENS, STEPS, SEEDS = 32, 256, 10, 3


def config(width: int, *, head_dim: int = 32, optimizer: dict[str, Any] | None = None, **model: Any) -> Config:
    sections = {
        "data": {"seq_len": TOKENS, "total_steps": STEPS},
        "adam": {"lr": 5e-3, "weight_decay": 0.1},
        "optimizer": optimizer or {},
        "lr_scheduler": {"total_steps": STEPS, "warmup_steps": 0, "kind": "constant"},
        "model": {
            "hidden_size": width,
            "num_attention_heads": width // head_dim,
            "num_layers": 2,
            "vocab_size": VOCAB,
            "mlp_ratio": 2,
            "multiple_of": 32,
            "no_bias": True,
            "init_std": 0.05,
            "dtype": "torch.float32",
            **model,
        },
    }
    return Config.model_validate(sections)


def mup(width: int, **changes: Any) -> Config:
    return config(width, scaling="mup", mup_base_width=WIDTHS[0], **changes)


def sizes_after_training(of: Config, seed: int) -> dict[str, float]:
    """Mean magnitudes of each block's output, of the last norm's and of the logits after STEPS steps on one row."""
    mesh = single_process_mesh()
    model = build_model(of.model, LossConfig(), mesh, AttentionBackend.SDPA)
    initialise(model, seed)
    with torch.no_grad():
        model.output.weight.zero_()  # else narrow models have larger logits from the start, by chance
    optimizer = HybridZeroOptimizer(model.units(), of, mesh, torch.float32)
    tokens = torch.randint(0, VOCAB, (TOKENS + 1,), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        optimizer.begin(1)
        losses = model.losses(hidden(model, tokens[:-1]), tokens[1:], optimizer.loss_scale / TOKENS)
        losses.scaled_sum.backward()
        optimizer.step(step, TOKENS, TOKENS)
    optimizer.wait_weights()
    found: dict[str, float] = {}
    for number, block in model.layers.items():
        block.register_forward_hook(lambda _module, _args, out, at=number: found.update({f"block {at}": size(out)}))
    with torch.no_grad():
        out = hidden(model, tokens[:-1])
        found["logits"] = size(model.logits(out))
    return found


def hidden(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    attend = packed(AttentionBackend.SDPA, bounds, (0, TOKENS), TOKENS)
    return model.hidden(tokens, torch.arange(TOKENS), attend)


def size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().mean())


def spread(configs: list[Config]) -> dict[str, float]:
    """Of each activation: the largest of its sizes over the configs, divided by the smallest; mean of the seeds."""
    runs = [[sizes_after_training(one, seed) for seed in range(SEEDS)] for one in configs]
    means = [{name: sum(run[name] for run in of_width) / SEEDS for name in of_width[0]} for of_width in runs]
    return {name: max(of[name] for of in means) / min(of[name] for of in means) for name in means[0]}


@pytest.mark.slow
def test_activations_are_as_large_at_every_width() -> None:
    with_mup = spread([mup(width) for width in WIDTHS])
    assert max(with_mup.values()) < 1.2, with_mup
    without = spread([config(width) for width in WIDTHS])
    assert without["logits"] > 2, without
    # A wrong multiplier is seen: logits that are not divided by m.
    wrong = spread([mup(width, logit_scale=1.0) for width in WIDTHS])
    assert wrong["logits"] > 2, wrong


@pytest.mark.slow
def test_activations_under_muon_are_as_large_at_every_width() -> None:
    """By the spectral scale alone updates are as large as matrices want them: without lr / m, and not RMS-matched."""
    widths = WIDTHS[:-1]
    with_mup = spread([mup(width, optimizer=MUON) for width in widths])
    assert max(with_mup.values()) < 1.2, with_mup
    ends = widths[0], widths[-1]
    without = spread([config(width, optimizer=MUON) for width in ends])
    assert without["block 1"] > 2 and without["logits"] > 1.5, without
    # A wrong scale is seen: updates with elements as large as those of AdamW grow with the width.
    wrong = spread([mup(width, optimizer={**MUON, "update_scale": "rms"}) for width in ends])
    assert wrong["block 1"] > 2, wrong


def test_each_parameter_has_the_values_of_its_role() -> None:
    """m = 4: matrices of blocks alone have another learning rate, decay and initial size; nothing is scaled twice."""
    base, wide = config(64, tie_word_embeddings=False), mup(256, tie_word_embeddings=False)
    rows = {}
    for of in (base, wide):
        groups = ParamGroups(of)
        for param in meta_model(of.model).parameters():
            group, spec = groups.of(param), param.shard_spec
            rows.setdefault(spec.name, []).append((group.lr, group.weight_decay, spec.init_std, spec.fill))
    for name, (small, large) in rows.items():
        if any(part in name for part in ("wqkv", "wo", "w1", "w2", "w3")):
            assert large[0] == small[0] / 4 and large[1] == small[1] * 4
            assert large[2] == pytest.approx(small[2] / 2) and large[0] * large[1] == small[0] * small[1]
        else:
            assert large == small, name
    assert wide.model.logit_scale == 1 / 4 and wide.model.attention_scale is None
    assert mup(256, head_dim=64, mup_base_head_dim=32).model.attention_scale == 32**0.5 / 64


def test_groups_by_pattern_give_values_of_the_base_width() -> None:
    groups = [{"pattern": "*w1*", "lr": 8e-3, "weight_decay": 0.5}, {"pattern": "*norm*", "lr": 1e-3}]
    wide = config(256, scaling="mup", mup_base_width=64)
    wide = Config.model_validate({**wide.model_dump(), "optimizer": {"groups": groups}})
    found = {param.shard_spec.name: ParamGroups(wide).of(param) for param in meta_model(wide.model).parameters()}
    first = next(group for name, group in found.items() if "w1" in name)
    assert (first.lr, first.weight_decay) == (8e-3 / 4, 0.5 * 4)
    assert next(group for name, group in found.items() if "norm" in name).lr == 1e-3


def test_betas_for_a_matrix_of_muon_are_refused() -> None:
    keys = {"name": "muon", "groups": [{"pattern": "layers.*", "betas": [0.9, 0.99]}]}
    of = Config.model_validate({**config(64).model_dump(), "optimizer": keys})
    params = {param.shard_spec.name: param for param in meta_model(of.model).parameters()}
    matrix = next(param for name, param in params.items() if "w1" in name)
    with pytest.raises(ConfigError, match=r"'layers\.\*' has betas and matches layers\.0.*w1.*leave betas out"):
        ParamGroups(of).of(matrix)
    norm = next(param for name, param in params.items() if name.startswith("layers") and "norm" in name)
    assert ParamGroups(of).of(norm).beta2 == 0.99


def test_at_the_base_width_nothing_changes() -> None:
    plain, scaled = config(64), mup(64, mup_base_head_dim=32)
    assert scaled.model.logit_scale is None and scaled.model.attention_scale == pytest.approx(32**-0.5)
    same = [list(meta_model(of.model).parameters()) for of in (plain, scaled)]
    for one, other in zip(*same, strict=True):
        assert one.shard_spec == other.shard_spec
        groups = [ParamGroups(of).of(param) for of, param in ((plain, one), (scaled, other))]
        assert groups[0] == groups[1]


def test_a_shared_embedding_starts_as_large_at_every_width() -> None:
    models = (meta_model(mup(width, tie_word_embeddings=True).model) for width in (64, 1024))
    stds = {param.shard_spec.init_std for model in models for param in model.parameters() if param.looked_up}
    assert stds == {0.05}


def test_multipliers_that_are_given_stay() -> None:
    assert mup(256, logit_scale=3.0).model.logit_scale == 3.0
    assert ModelConfig.model_validate(mup(256).model.model_dump()) == mup(256).model
