"""Wrong dropout, update rules, schedules and evaluations; names that other projects give to keys of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_bad_configs import GOOD, problems

MODEL = [
    ("embedding_dropout=1.0", "model.embedding_dropout: found 1.0, expected a number >= 0 and < 1"),
    ("embedding_dropout=-0.1", "model.embedding_dropout: found -0.1, expected a number >= 0 and < 1"),
    ("residual_dropout=2", "model.residual_dropout: found 2, expected a number >= 0 and < 1"),
    (
        "residual_dropout='0.1'",
        "model.residual_dropout: found '0.1', expected a number >= 0 and < 1; remove the quotes",
    ),
    ("attention_dropout=True", "model.attention_dropout: found True, expected a number >= 0 and < 1; write the number"),
    ("attention_dropout=None", "model.attention_dropout: found None, expected a number >= 0 and < 1"),
    (
        "attention_dropout=0.1, attention='flash_attn'",
        'model.attention_dropout: found 0.1 with model.attention "flash_attn", which drops attention weights by',
    ),
    ("attention_dropout=0.1, attention='cudnn'", 'model.attention_dropout: found 0.1 with model.attention "cudnn"'),
    ("attention_dropout=0.1, attention='flash_attn', use_flash_attn=False", None),
    ("attention_dropout=0.1, attention='sdpa', residual_dropout=0.1, embedding_dropout=0.1", None),
    ("dropout=0.1", "model.dropout: unknown key; nearest known key: model.residual_dropout"),
    ("attn_pdrop=0.1", "model.attn_pdrop: unknown key; nearest known key: model.attention_dropout"),
    ("embd_pdrop=0.1", "model.embd_pdrop: unknown key; nearest known key: model.embedding_dropout"),
    ("emb_dim=768", "model.emb_dim: unknown key; nearest known key: model.hidden_size"),
    ("n_embd=768", "model.n_embd: unknown key; nearest known key: model.hidden_size"),
    ("n_heads=12", "model.n_heads: unknown key; nearest known key: model.num_attention_heads"),
    ("n_layer=12", "model.n_layer: unknown key; nearest known key: model.num_layers"),
    ("context_length=1024", "model.context_length: unknown key; nearest known key: data.seq_len"),
    ("sliding_window_pattern=6", "model.sliding_window_pattern: unknown key; nearest known key: model.layer_types"),
    ("max_window_layers=3", "model.max_window_layers: unknown key; nearest known key: model.layer_types"),
    (
        "use_parallel_residual=True",
        "model.use_parallel_residual: found True: this asks for attention and feed-forward part side by side, which is",
    ),
    ("no_rope_every=4.0", "model.no_rope_every: found 4.0, expected an integer >= 0; write 4"),
    ("zero_centered_norm=1", "model.zero_centered_norm: found 1, expected True or False; write True"),
    ("norm_bias='yes'", "model.norm_bias: found 'yes', expected True or False or None"),
    ("layer_norm_epsilon=0", "model.layer_norm_epsilon: found 0, expected a number > 0"),
    (
        "rope_scaling=dict(rope_type='longrope', factor=2.0)",
        "found 'longrope', expected one of 'linear', 'llama3', 'yarn', 'dynamic'; change the value",
    ),
    ("rope_scaling='dynamic'", "model.rope_scaling: found 'dynamic', expected dict(rope_type=..., factor=...) or None"),
]
SGD = "optimizer = dict(name='sgd')"
REST = [
    (SGD, None),
    ("optimizer = dict(name='sgd', momentum=-0.1)", "optimizer.momentum: found -0.1, expected a number >= 0 and < 1"),
    (
        "optimizer = dict(name='sgd', nesterov=True)",
        'optimizer.nesterov: found True with "sgd", expected "muon"; remove it, or change the rule',
    ),
    ("optimizer = dict(name='muon', muon_lr=0.02, muon_weight_decay=0, momentum=0.9, update_scale='spectral')", None),
    ("optimizer = dict(name='muon', ns_steps=0)", "optimizer.ns_steps: found 0, expected an integer >= 1 and <= 20"),
    ("optimizer = dict(name='muon', muon_lr=-1)", "optimizer.muon_lr: found -1, expected a number >= 0 and <= 3e+38"),
    ("optimizer = dict(name='muon', ns_dtype='torch.float16')", "expected one of 'torch.float32', 'torch.bfloat16'"),
    ("optimizer = dict(name='muon', update_scale='max')", "optimizer.update_scale: found 'max', expected one of"),
    ("optimizer = dict(muon_lr=0.02)", 'optimizer.muon_lr: found 0.02 with "adamw", expected "muon"; remove it, or'),
    ("optimizer = dict(name='muon', ns_step=5)", "optimizer.ns_step: unknown key"),
    ("optimizer = dict(name='adam')", "optimizer.name: found 'adam', expected one of 'adamw', 'adamw_cs336', "),
    (
        f"{SGD}; adam['adam_beta2'] = 0.999",
        'adam.adam_beta2: found 0.999 with optimizer.name "sgd", which does not read it; expected 0.95; remove it, or',
    ),
    (f"{SGD}; adam['adam_beta1'] = 0.8", 'adam.adam_beta1: found 0.8 with optimizer.name "sgd", which does not read'),
    (f"{SGD}; adam['adam_eps'] = 1e-6", 'adam.adam_eps: found 1e-06 with optimizer.name "sgd", which does not read it'),
    (f"{SGD}; beta2_scheduler = dict(c=0.8)", 'beta2_scheduler.c: found 0.8 with optimizer.name "sgd", which does not'),
    (
        "optimizer = dict(name='lion'); adam['adam_eps'] = 1e-6",
        'adam.adam_eps: found 1e-06 with optimizer.name "lion", which does not read it; expected 1e-08; remove it, or',
    ),
    ("optimizer = dict(name='lion'); adam['adam_beta2'] = 0.99", None),
    ("lr_scheduler['warmup_steps'] = -1", "lr_scheduler.warmup_steps: found -1, expected an integer >= 0 or None"),
    ("lr_scheduler['warmup_steps'] = 0.5", "lr_scheduler.warmup_steps: found 0.5, expected an integer >= 0 or None"),
    ("lr_scheduler['warmup_from_zero'] = 1", "lr_scheduler.warmup_from_zero: found 1, expected True or False; write"),
    (
        "lr_scheduler['warmup_iters'] = 5",
        "lr_scheduler.warmup_iters: unknown key; nearest known key: lr_scheduler.warm",
    ),
    ("data['valid_train_batches'] = -1", "data.valid_train_batches: found -1, expected an integer >= 0"),
    (
        "data.update(valid_every=5, valid_at_start=1)",
        "data.valid_at_start: found 1, expected True or False; write True",
    ),
    ("ckpt = dict(keep_best=3)", "ckpt.keep_best: found 3, expected True or False"),
    ("monitor = dict(sample_every=-1)", "monitor.sample_every: found -1, expected an integer >= 0 or 'epoch'"),
    ("monitor = dict(sample_every='epoch')", "monitor.sample_every: found without prompts; give some, or set it to 0"),
    ("data['eval_iters'] = 5", "data.eval_iters: unknown key; nearest known key: data.valid_batches"),
    ("loss = dict(z_loss='1e-4')", "loss.z_loss: found '1e-4', expected a number >= 0; remove the quotes"),
]


@pytest.mark.parametrize(("keys", "found"), [*MODEL, *REST], ids=lambda value: str(value)[:60])
def test_one_error_each(keys: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of_model = (keys, found) in MODEL
    told = problems(GOOD.replace("num_layers=4", f"num_layers=4, {keys}") if of_model else f"{GOOD}{keys}\n")
    assert len(told) == (found is not None), told
    assert found is None or (f"bad.py:{18 if of_model else 25}: " in told[0] and found in told[0])
