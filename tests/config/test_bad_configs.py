"""Bad configs: each names file and line, what was found, what was expected, and the nearest known key."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from internlm_lite.config import cross
from internlm_lite.config.load import check_config, load_config
from internlm_lite.errors import ConfigError

GOOD = """\
JOB_NAME = "bad"
SEQ_LEN = 128
data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    total_steps=100,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1),
    max_scale=2**24,
)
adam = dict(lr=1e-4)
lr_scheduler = dict(total_steps=data["total_steps"], eta_min=1e-5)
model = dict(
    num_attention_heads=8,
    vocab_size=512,
    hidden_size=128,
    num_layers=4,
    dtype="torch.float16",
)
parallel = dict(
    zero1=-1,
    tensor=2,
)
"""
WORLD = 4

# (text of GOOD, what replaces it, "line: start of the message"); no text: the line is added at the end, as line 25.
BAD = [
    ("seq_len=SEQ_LEN", "seq_lenn=SEQ_LEN", "4: data.seq_lenn: unknown key; nearest known key: data.seq_len"),
    ("micro_num=4", "micronum=4", "5: data.micronum: unknown key; nearest known key: data.micro_num"),
    ("micro_num=4", "micro_num=True", "5: data.micro_num: found True, expected an integer > 0; write the number"),
    ("micro_num=4", "micro_num='4'", "5: data.micro_num: found '4', expected an integer > 0; remove the quotes"),
    ("micro_num=4", "micro_num=4.0", "5: data.micro_num: found 4.0, expected an integer > 0; write 4"),
    ("micro_num=4", "micro_num=0", "5: data.micro_num: found 0, expected an integer > 0; leave micro_num out for 1"),
    (
        "micro_num=4",
        "micro_num=None",
        "5: data.micro_num: found None, expected an integer > 0; leave micro_num out for 1",
    ),
    ("micro_num=4", "skip_batches=7", '5: data.skip_batches: found 7, expected a string; write "7"'),
    (
        "micro_num=4",
        "skip_batches='3-1'",
        "5: data.skip_batches: found '3-1', expected ranges that rise; write \"1-3\" for '3-1'",
    ),
    (
        "micro_num=4",
        "skip_batches='a'",
        "5: data.skip_batches: found 'a', expected batch ids and inclusive ranges such as \"1-3,7\";",
    ),
    (
        "micro_num=4",
        "micro_num=4, rampup_batch_size='8 1 2'",
        "5: data.rampup_batch_size: found '8 1 2', which does not reach data.micro_num 4 from 8 in",
    ),
    (
        "micro_num=4",
        "rampup_batch_size='1 2'",
        "5: data.rampup_batch_size: found '1 2', expected three integers > 0, \"start increment",
    ),
    (
        "micro_num=4",
        "micro_num=4, rampup_batch_size='1 1 5 rows'",
        "5: data.rampup_batch_size: found '1 1 5 rows', expected three integers > 0",
    ),
    (
        "micro_num=4",
        "micro_num=4, rampup_batch_size='1 2 5'",
        "5: data.rampup_batch_size: found '1 2 5', which does not reach data.micro_num 4 from 1 in",
    ),
    (
        "total_steps=100,",
        "total_steps=-100,",
        "6: data.total_steps: found -100, expected an integer >= 0; leave total_steps out for 0",
    ),
    ("fp16=dict(", "fp61=dict(", "9: grad_scaler.fp61: unknown key; nearest known key: grad_scaler.fp16"),
    ("min_scale=1", "min_scale=2**17", "9: grad_scaler.fp16.initial_scale: found 65536, expected at least"),
    ("max_scale=2**24", "max_scale=16", "9: grad_scaler.fp16.initial_scale: found 65536, expected at least"),
    ("lr=1e-4", "lr='1e-4'", "12: adam.lr: found '1e-4', expected a number >= 0 and <= 3e+38; remove the quotes"),
    ("lr=1e-4", "lr=float('nan')", "12: adam.lr: found nan, expected a number >= 0 and <= 3e+38; leave lr out"),
    ("lr=1e-4", "learning_rate=1e-4", "12: adam.learning_rate: unknown key; nearest known key: adam.lr"),
    ("lr=1e-4", "eta_min=1e-4", "12: adam.eta_min: unknown key; nearest known key: lr_scheduler.eta_min"),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(groups=[dict(pattern='*', lrr=1e-3)]",
        "13: optimizer.groups[0].lrr: unknown key; nearest known key: optimizer.groups[0].lr",
    ),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(groups=[dict(pattern='a'), dict(lr=1)]",
        "13: optimizer.groups[1].pattern: missing; expected a string; add pattern=... to optimizer.groups[1] = dict(",
    ),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(groups=[dict(pattern='a', betas=[0.9])]",
        "13: optimizer.groups[0].betas: found [0.9], expected a list of 2 numbers >= 0 and < 1 or None; leave betas",
    ),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(groups=[3]",
        "13: optimizer.groups[0]: found 3, expected dict(...) with keys of pattern, lr, weight_decay, betas",
    ),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(groups=dict(pattern='a')",
        "13: optimizer.groups: found {'pattern': 'a'}, expected a list of dict(pattern=...); leave groups out for []",
    ),
    (
        "lr=1e-4",
        "lr=1e-4)\noptimizer = dict(name='sgd', groups=[dict(pattern='a', betas=[0.8, 0.9])]",
        '13: optimizer.groups[0].betas: found [0.8, 0.9] with optimizer.name "sgd", which does not read it; leave it',
    ),
    (
        "eta_min=1e-5",
        "warmup_ratio=1.5",
        "13: lr_scheduler.warmup_ratio: found 1.5, expected a number >= 0 and <= 1 or None; leave",
    ),
    (
        "eta_min=1e-5",
        "init_steps=99, warmup_ratio=0.5",
        "13: lr_scheduler.init_steps: found 99 + 50 warm-up steps, expected at most",
    ),
    (
        "eta_min=1e-5",
        "warmup_steps=101",
        "13: lr_scheduler.init_steps: found 0 + 101 warm-up steps, expected at most",
    ),
    (
        "eta_min=1e-5",
        "warmup_steps=5, warmup_ratio=0.05",
        "13: lr_scheduler.warmup_steps: found 5 beside warmup_ratio 0.05; leave one of them out",
    ),
    (
        "eta_min=1e-5",
        "warmup_steps=5, warmup_tokens=5000",
        "13: lr_scheduler.warmup_tokens: found 5000 beside warmup_steps 5; leave one of them out",
    ),
    ("eta_min=1e-5", "eta_min=1e308", "13: lr_scheduler.eta_min: found 1e+308, expected a number >= 0 and <= 3e+38"),
    ("eta_min=1e-5", "warmup_tokens=-1", "13: lr_scheduler.warmup_tokens: found -1, expected an integer >= 0 or None"),
    ("eta_min=1e-5", "kind='wds'", "13: lr_scheduler.kind: found 'wds', expected one of 'cosine', 'wsd', 'linear'"),
    (
        "eta_min=1e-5",
        "decay_steps=5",
        '13: lr_scheduler.decay_steps: found 5 with kind "cosine", expected "wsd"; change one of them',
    ),
    ("eta_min=1e-5", "kind='wsd', decay_steps=10**6", "13: lr_scheduler.decay_steps: found 1000000 after "),
    (
        "eta_min=1e-5",
        "kind='wsd', decay_steps=5, decay_ratio=0.1",
        "13: lr_scheduler.decay_steps: found 5 beside decay_ratio 0.1; leave one of them out",
    ),
    (
        "eta_min=1e-5",
        "kind='wsd', decay_shape='exponential'",
        '13: lr_scheduler.eta_min: found 0 with "exponential", which never reaches it; expected more',
    ),
    (
        "eta_min=1e-5",
        "kind='noam', warmup_steps=0",
        '13: lr_scheduler.warmup_steps: found 0 warm-up steps with kind "noam"',
    ),
    ("eta_min=1e-5", "kind='steps'", "13: lr_scheduler.step_factors: found None, expected [[step, factor], ...]"),
    (
        "eta_min=1e-5",
        "kind='steps', step_factors=[[50, 0.5], [40, 0.1]]",
        "13: lr_scheduler.step_factors: found [40, 0.1], expected a whole step above 50 and a factor of at least 0",
    ),
    (
        "num_attention_heads=8",
        "num_attention_heads=7",
        "17: model.hidden_size: found 128, expected a multiple of model.num_attention_heads 7;",
    ),
    (
        "num_attention_heads=8",
        "num_attention_heads=8, num_kv_attention_heads=3",
        "15: model.num_attention_heads: found 8, expected a multiple of model.num_kv_attention_heads",
    ),
    (
        "num_attention_heads=8",
        "num_attention_heads=8, num_kv_attention_heads=1",
        "15: model.num_kv_attention_heads: found 1, expected a multiple of parallel.tensor 2; change",
    ),
    (
        "num_attention_heads=8",
        "num_attention_heads=128",
        "17: model.hidden_size: found 1 features per head, expected an even number for the rotary",
    ),
    (
        "vocab_size=512",
        "vocab_size=513",
        "16: model.vocab_size: found 513, expected a multiple of parallel.tensor 2; change one of",
    ),
    (
        "vocab_size=512",
        "vocabulary=512",
        "14: model.vocab_size: missing; expected an integer > 0; add vocab_size=... to model =",
    ),
    ("hidden_size=128", "hiden_size=128", "17: model.hiden_size: unknown key; nearest known key: model.hidden_size"),
    ("num_layers=4", "layers=4", "18: model.layers: unknown key; nearest known key: model.num_layers"),
    (
        "num_layers=4",
        "num_layers=4, num_chunks=2",
        "18: model.num_chunks: found 2 with parallel.pipeline.size 1; chunks are stages of a pipeline: set it to 1",
    ),
    (
        "num_layers=4",
        "num_layers=4, checkpoint=2",
        "18: model.checkpoint: found 2, expected True or False or a number >= 0 and <= 1 or one of 'selective', "
        "'offload'; leave",
    ),
    (
        "num_layers=4",
        "num_layers=4, checkpoint='all'",
        "18: model.checkpoint: found 'all', expected True or False or a number >= 0 and <= 1 or one of 'selective', "
        "'offload'; write",
    ),
    (
        "torch.float16",
        "torch.fp16",
        "19: model.dtype: found 'torch.fp16', expected one of 'torch.float16', 'torch.half',",
    ),
    (
        "num_layers=4",
        "num_layers=4, checkpoint='selectiv'",
        "18: model.checkpoint: found 'selectiv', expected True or False or a number >= 0 and <= 1 or one of "
        "'selective', 'offload'; write"
        " 'selective'",
    ),
    (
        "num_layers=4",
        "num_layers=4, causal=False",
        "18: model.causal: found False, expected True or no such key; every layer of a decoder is causal",
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_position='pree'",
        "18: model.norm_position: found 'pree', expected one of 'pre', 'post', 'reordered', 'sandwich' or None; write "
        "'pre'",
    ),
    (
        "torch.float16",
        "bf16",
        "19: model.dtype: found 'bf16', expected one of 'torch.float16', 'torch.half', 'torch.bfloat16', "
        "'torch.float32', 'torch.tf32', 'torch.float64'; write 'torch.bfloat16'",
    ),
    ("torch.float16", "float16", "19: model.dtype: found 'float16', expected one of 'torch.float16', 'torch.half',"),
    (
        'dtype="torch.float16"',
        "dtype=16",
        "19: model.dtype: found 16, expected one of 'torch.float16', 'torch.half', 'torch.bfloat16',",
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_type='batchnorm'",
        "18: model.norm_type: found 'batchnorm', expected one of 'rmsnorm', 'layernorm', 'sample_layernorm'; leave",
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_bias=True",
        '18: model.norm_bias: found True with model.norm_type "rmsnorm", which has no bias; set model.norm_type=',
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_position='middle'",
        "18: model.norm_position: found 'middle', expected one of 'pre', 'post', 'reordered', 'sandwich'",
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_position='sandwich', apply_post_layer_norm=True",
        '18: model.norm_position: found "sandwich" with model.apply_post_layer_norm=True, which says "post"; remove',
    ),
    (
        "num_layers=4",
        "num_layers=4, norm_type='layernorm', qk_norm='full'",
        '18: model.qk_norm: found "full" with model.norm_type "layernorm", expected "rmsnorm", as in OLMo 2;',
    ),
    (
        "num_layers=4",
        "num_layers=4, qk_norm=True",
        "18: model.qk_norm: found True, expected one of False, 'head', 'full'",
    ),
    (
        "num_layers=4",
        "num_layers=4, qk_norm='head', head_dim=7",
        "18: model.head_dim: found 7 features per head, expected an even number for the rotary embedding; change",
    ),
    (
        "num_layers=4",
        "num_layers=4, layernorm_zero_centered_gamma=True",
        "18: model.layernorm_zero_centered_gamma: unknown key; nearest known key: model.zero_centered_norm",
    ),
    (
        "num_layers=4",
        "num_layers=4, multiple_of=27",
        "17: model.mlp_ratio: found a feed-forward width of 351 (hidden_size * mlp_ratio rounded up to a",
    ),
    (
        "num_layers=4",
        "num_layers=4, tie_word_embeddings=True",
        "18: model.tie_word_embeddings: found True with parallel.tensor 2 and",
    ),
    (
        "num_layers=4",
        "num_layers=4, use_flash_attn=1",
        "18: model.use_flash_attn: found 1, expected True or False; write True",
    ),
    (
        "num_layers=4",
        "num_layers=4, use_flash_attn='True'",
        "18: model.use_flash_attn: found 'True', expected True or False; write True",
    ),
    (
        "tensor=2",
        "tensor=3",
        "23: parallel.tensor: one copy of the model takes 3 * parallel.pipeline.size 1 = 3 processes; found 4",
    ),
    (
        "",
        "parallel = dict(context=dict(size=4, exchange='ulysses')); model.update(num_attention_heads=6, head_dim=16)",
        '25: parallel.context.size: found 4 with exchange "ulysses" and 6 query heads, expected a divisor of 6: every',
    ),
    (
        "",
        "parallel.update(context=dict(size=2, exchange='ulysses')); model.update(num_attention_heads=6, head_dim=16)",
        '25: parallel.context.size: found 2 with exchange "ulysses" and 3 query heads on each tensor-parallel rank,',
    ),
    ("tensor=2", "tensr=2", "23: parallel.tensr: unknown key; nearest known key: parallel.tensor"),
    (
        "tensor=2",
        "pipeline=dict(sizee=2)",
        "23: parallel.pipeline.sizee: unknown key; nearest known key: parallel.pipeline.size",
    ),
    (
        "tensor=2",
        "pipeline=8",
        "23: parallel.tensor: one copy of the model takes 1 * parallel.pipeline.size 8 = 8 processes; found 4",
    ),
    (
        "tensor=2",
        "pipeline=dict(schedule='zbv')",
        '23: parallel.pipeline.schedule: found "zbv" with parallel.pipeline.size 1; remove it, or set',
    ),
    (
        "tensor=2",
        "pipeline=dict(size=2, schedule='zbv')",
        '23: model.num_chunks: found 1, expected 2 with parallel.pipeline.schedule "zbv"; change one of them',
    ),
    (
        "tensor=2",
        "pipeline=dict(size=2, schedule='interleaved')",
        '23: model.num_chunks: found 1, expected 2 or more with parallel.pipeline.schedule "interleaved"; change',
    ),
    (
        "tensor=2",
        "pipeline=dict(size=2, schedule='gpipe')",
        "23: parallel.pipeline.schedule: found 'gpipe', expected one of '1f1b', 'interleaved', 'zbv'",
    ),
    (
        "tensor=2",
        "tensor=8, sequence_parallel=True",
        "23: parallel.tensor: one copy of the model takes 8 * parallel.pipeline.size 1 = 8 processes; found 4",
    ),
    (
        "tensor=2",
        "tensor=dict(size=2, mode='isp')",
        "23: parallel.tensor: found mode='isp': weight parallelism is not supported,",
    ),
    (
        "tensor=2",
        "weight=dict(size=2)",
        "23: parallel.weight: found {'size': 2}, expected size 1: weight parallelism is not supported;",
    ),
    (
        "zero1=-1",
        "zero_stage=4",
        "22: parallel.zero_stage: found 4, expected an integer >= 1 and <= 3",
    ),
    ("tensor=2", "context=0", "23: parallel.context.size: found 0, expected an integer > 0"),
    ("tensor=2", "context='2'", "23: parallel.context: found '2', expected dict(...)"),
    (
        "tensor=2",
        "context=dict(size=2, exchange='allgather')",
        "23: parallel.context.exchange: found 'allgather', expected one of 'gather', 'ring', 'ulysses'",
    ),
    ("tensor=2", "context=3", "23: parallel.context.size: found 3 with rows of micro_bsz * seq_len ="),
    (
        "zero1=-1",
        "zero1=3",
        "22: parallel.zero1: found 3, expected a divisor of the data parallel size 2 (4 processes /",
    ),
    ("zero1=-1", "zero1='all'", "22: parallel.zero1: found 'all', expected an integer; write a value of this kind"),
    (
        "zero1=-1",
        "zero1=dict(sizee=2)",
        "22: parallel.zero1: found {'sizee': 2}, expected a number, or dict(size=..., fsdp=...)",
    ),
    ("zero1=-1", "zero_stage=True", "22: parallel.zero_stage: found True, expected an integer >= 1 and <= 3"),
    ("zero1=-1", "zero1=dict(fsdp='no')", "22: parallel.zero1: found fsdp='no', expected True or False"),
    (
        "zero1=-1",
        "zero_stage=2, zero1=dict(fsdp=True)",
        "22: parallel.zero1: found fsdp=True, which is parallel.zero_stage=3, beside 2; remove one of them",
    ),
    ("parallel = dict(", "parallell = dict(", "21: parallell: unknown key; nearest known key: parallel"),
    ('JOB_NAME = "bad"', "JOB_NAME = 7", '1: JOB_NAME: found 7, expected a string; write "7"'),
    (
        'JOB_NAME = "bad"',
        "JOB_NAME = 'a/b'",
        "1: JOB_NAME: found 'a/b', expected the name of a folder: printable, no '/', not empty",
    ),
    (
        "",
        "hybrid_optimizer = dict(lr=1)",
        "25: hybrid_optimizer: unknown key; nearest known key: hybrid_zero_optimizer",
    ),
    ("", "optimizer = dict(lr=1)", "25: optimizer.lr: unknown key; nearest known key: adam.lr"),
    ("", "optimizer = dict(name='sdg')", "25: optimizer.name: found 'sdg', expected one of 'adamw', 'adamw_cs336', "),
    ("", "optimizer = dict(momentum=0.9)", '25: optimizer.momentum: found 0.9 with "adamw", expected "sgd" or'),
    (
        "",
        "optimizer = dict(name='sgd', momentum=1.0)",
        "25: optimizer.momentum: found 1.0, expected a number >= 0 and < 1",
    ),
    ("", "model['scaling'] = 'mup'", "25: model.mup_base_width: found None, expected the hidden_size at which"),
    (
        "",
        "model |= dict(scaling='mup', mup_base_width=64); optimizer = dict(name='muon')",
        '25: optimizer.update_scale: found \'rms\' with model.scaling="mup"; expected "spectral"',
    ),
    ("", "model['mup_base_width'] = 64", '25: model.mup_base_width: found 64 with scaling "standard", expected "mup"'),
    (
        "",
        "model |= dict(scaling='mup', mup_base_width=64); optimizer = dict(name='sgd')",
        '25: optimizer.name: found "sgd", whose updates grow with the gradient, with model.scaling="mup"; expected',
    ),
    ("", "adam['weight_decay_on'] = 'none'", "25: adam.weight_decay_on: found 'none', expected one of 'matrices', "),
    ("", "data['valid_at_start'] = True", "25: data.valid_at_start: found True with data.valid_every 0: there are no"),
    ("", "data['valid_train_batches'] = 5", "25: data.valid_train_batches: found 5 with data.valid_every 0: there are"),
    ("", "ckpt = dict(keep_best=True)", "25: ckpt.keep_best: found True with data.valid_every 0: there are no"),
    (
        "",
        "evaluation = dict(every=5)",
        "25: evaluation.every: found 5 without evaluation.tasks; name some, or remove it",
    ),
    ("", "evaluation = dict(tasks=['x'])", "25: evaluation.tasks: found without data.tokenizer; set it, or remove"),
    (
        "",
        "evaluation, data['tokenizer'] = dict(tasks=['x']), 't'",
        "25: evaluation.tasks: found tasks that are never evaluated; set evaluation.every or data.valid_every",
    ),
    (
        "",
        "evaluation, data['tokenizer'] = dict(tasks=['x', 'x'], every=2), 't'",
        "25: evaluation.tasks: found 'x' twice, expected each task once; remove one",
    ),
    (
        "",
        "evaluation, data['tokenizer'] = dict(tasks=['cloze_word'], every=2), 't'",
        "25: evaluation.tasks: found 'cloze_word', which is made of the text of data.valid_folder; set it, or",
    ),
    (
        "",
        "evaluation, data['tokenizer'] = dict(tasks=['x'], every=2, weights='ema'), 't'",
        "25: evaluation.weights: found 'ema' without ema = dict(...), so nothing is averaged; set it, or remove this",
    ),
    (
        "",
        "evaluation = dict(keep_best='los'); data['valid_every'] = 2",
        "25: evaluation.keep_best: found 'los', expected one of loss, acc, perplexity, bits_per_byte",
    ),
    (
        "",
        "evaluation = dict(keep_best='loss'); ckpt = dict(enable_save_ckpt=True, save_ckpt_folder='s')",
        "25: evaluation.keep_best: found 'loss' with data.valid_every 0: there are no evaluations",
    ),
    (
        "",
        "evaluation = dict(keep_best='x/acc'); ckpt = dict(enable_save_ckpt=True, save_ckpt_folder='s')",
        "25: evaluation.keep_best: found 'x/acc' without evaluation.tasks; name the task there, or correct it",
    ),
    (
        "",
        "evaluation = dict(keep_best='ema/loss'); data['valid_every'] = 2",
        "25: evaluation.keep_best: found 'ema/loss' without ema = dict(...): there are no averaged weights; set it",
    ),
    (
        "",
        "evaluation = dict(keep_best='loss'); data['valid_every'] = 2",
        "25: evaluation.keep_best: found 'loss' with ckpt.enable_save_ckpt=False; change one of them",
    ),
    (
        "",
        "ckpt, data['valid_every'] = dict(keep_best=True), 5",
        "25: ckpt.keep_best: found True with ckpt.enable_save_ckpt=False; change one of them",
    ),
    (
        "",
        "monitor = dict(sample_every='epoch', sample_prompts=['a']); data.update(weights={'a': 1}, tokenizer='t')",
        '25: monitor.sample_every: found "epoch" with data.weights, with which each folder has passes of its own;',
    ),
    ("", "monitor = dict(sample_every='era')", "25: monitor.sample_every: found 'era', expected"),
    # Stages, and what says how long the run is.
    (
        "",
        "stages = [dict(until=40), dict(until=40), dict()]",
        "25: stages[1].until: found 40, expected more than the 40",
    ),
    (
        "",
        "stages = [dict(until=60), dict(until=40), dict()]",
        "25: stages[1].until: found 40, expected more than the 60",
    ),
    (
        "",
        "stages = [dict(seq_len=64), dict(seq_len=32)]",
        "25: stages[0].until: found None, expected the step at which",
    ),
    (
        "",
        "stages = [dict(until=50), dict(until=99, seq_len=64)]",
        "25: stages[1].until: found 99, before the end of the run: data.total_steps is 100, and there is no stage",
    ),
    (
        "",
        "stages = [dict(until=50), dict(seqlen=64)]",
        "25: stages[1].seqlen: unknown key; nearest known key: stages[1].",
    ),
    (
        "",
        "stages = [dict(until='5'), dict()]",
        "25: stages[0].until: found '5', expected an integer > 0 or None;",
    ),
    ("", "stages = dict(until=5)", "25: stages: found {'until': 5}, expected a list of dict(...)"),
    (
        "",
        "stages = [dict(until=5), dict(weights={})]; data.update(train_folder='x')",
        "25: stages[1].weights: found {}",
    ),
    ("", "stages = [dict(until=5), dict(weights={'a': 1})]", "25: stages[1].weights: found without data."),
    (
        "",
        "stages = [dict(until=5), dict(seq_len=33)]; parallel.update(sequence_parallel=True)",
        "25: stages[1].seq_len: does not go with parallel.sequence_parallel: found True with rows of micro_bsz",
    ),
    (
        "",
        "stages = [dict(until=5), dict(seq_len=256)]; model.update(position='learned', max_position_embeddings=128)",
        "25: stages[1].seq_len: does not go with model.max_position_embeddings: found 128, expected at least",
    ),
    (
        "",
        "stages = [dict(until=5), dict(rope_base=5e5)]; model.update(position='none')",
        "25: stages[1].rope_base: found 500000 with model.position 'none', which rotates nothing; remove it",
    ),
    ("", "stages = [dict(until=5), dict(seq_len=2**40)]", "25: stages[1].seq_len: found rows of 1099511627776 tokens"),
    (
        "",
        "stages = [dict(until=5), dict(weights={'a': 1})]; data.update(train_folder='x', tokenizer='t'); "
        "monitor = dict(sample_every='epoch', sample_prompts=['a'])",
        '25: stages[1].weights: found with monitor.sample_every "epoch": with weights each folder has epochs',
    ),
    (
        "total_steps=100,",
        "total_steps=100, epochs=2,",
        "6: data.total_steps: found data.total_steps 100 and data.epochs",
    ),
    (
        "total_steps=100,",
        "epochs=2, total_tokens=10**9, **dict(total_steps=0),",
        "6: data.epochs: found data.epochs 2.0 and data.total_tokens 1000000000, expected one of them",
    ),
    (
        "total_steps=100,",
        "total_steps=0,",
        "6: data.total_steps: found 0 and no other length, expected data.total_steps,",
    ),
    (
        "total_steps=100,",
        "total_steps=100, max_epochs=0,",
        "6: data.max_epochs: found 0, expected a number > 0 or a dict",
    ),
    ("", "i = 3", "25: i: unknown key; expected one of JOB_NAME, seed, ckpt, data, stages, grad_scaler,"),
    ("", "seeed = 3", "25: seeed: unknown key; nearest known key: seed"),
    ("", "seed = -1", "25: seed: found -1, expected an integer >= 0; leave seed out for 1024"),
    (
        "",
        "cudnn_benchmark = 'yes'",
        "25: cudnn_benchmark: found 'yes', expected True or False; write a value of this kind",
    ),
    (
        "",
        "ckpt = dict(enable_save_ckpt=True)",
        "25: ckpt.enable_save_ckpt: found True without ckpt.save_ckpt_folder; set the folder, or",
    ),
    (
        "",
        "ckpt = dict(enable_save_ckpt=True, save_ckpt_folder='x', snapshot_ckpt_folder=None, oss_snapshot_freq=3)",
        "25: ckpt.oss_snapshot_freq: found 3 without ckpt.snapshot_ckpt_folder; set the folder, or",
    ),
    (
        "",
        "guard = dict(spike='rollback')",
        "25: guard.spike: found 'rollback' in a run without a checkpoint to go back to; set ckpt.enable_save_ckpt=True",
    ),
    (
        "",
        "ckpt = dict(save_ckpt_folder='local:x/../y', snapshot_ckpt_folder='y/')",
        "25: ckpt.snapshot_ckpt_folder: found the same folder for both; expected two",
    ),
    (
        "",
        "ckpt = dict(save_ckpt_folder='oss2:x')",
        "25: ckpt.save_ckpt_folder: found 'oss2:x', expected local:PATH, a plain path, or",
    ),
    (
        "",
        "ckpt = dict(save_ckpt_folder='boto3:x')",
        "25: ckpt.save_ckpt_folder: found 'boto3:x', expected local:PATH, a plain path, or",
    ),
    (
        "",
        "ckpt = dict(load_ckpt_folder='a', load_model_only_folder='b')",
        "25: ckpt.load_model_only_folder: found beside ckpt.load_ckpt_folder; a run starts from one",
    ),
    (
        "",
        "ckpt = dict(load_ckpt_info=dict(path='a', content=('optimizer',)))",
        "25: ckpt.load_ckpt_info: found content=('optimizer',), expected ('model',), ('all',) or",
    ),
    (
        "",
        "ckpt = dict(load_ckpt_info=dict(path='a', content=('model',), ckpt_type='hf_llama'))",
        "25: ckpt.load_ckpt_info: found ckpt_type='hf_llama'; only the checkpoints written here are",
    ),
    ("", "ckpt = 5", "25: ckpt: found 5, expected dict(...); write ckpt = dict(...)"),
    (
        "",
        "monitor = dict(alert=dict(enable_feishu_alert=True))",
        "25: monitor.alert: found no feishu_alert_address; add the address, or enable_feishu_alert=False",
    ),
    (
        "",
        "monitor = dict(alerts=dict(webhook='ftp://me:hush@chat.example/hush'))",
        "25: monitor.alerts.webhook: found what is no address (not shown), expected https://HOST/...",
    ),
    (
        "",
        "monitor = dict(alerts=dict(webhook='http://chat.example/x', format='slack'))",
        "25: monitor.alerts.webhook: found http, expected https; or set monitor.alerts.insecure=True",
    ),
    (
        "",
        "monitor = dict(alerts=dict(webhook='https://chat.example/x'))",
        '25: monitor.alerts.format: found None, and the host of the webhook is not known; expected "feishu", or',
    ),
    (
        "",
        "monitor = dict(sample_prompts=['a'])",
        "25: monitor.sample_prompts: found without data.tokenizer; set it, or remove the prompts",
    ),
    (
        "",
        "monitor = dict(sample_prompts=('a',))",
        "25: monitor.sample_prompts: found ('a',), expected a list of strings; leave sample_prompts",
    ),
    (
        "",
        "monitor=dict(sample_prompts=[1])",
        "25: monitor.sample_prompts: found [1], expected a list of strings; leave sample_prompts out",
    ),
    (
        "",
        "data['weights'] = {'code': 1}",
        "25: data.weights: found without data.train_folder; set it, or remove weights",
    ),
    (
        "",
        "data['weights'] = {'code': 0}",
        "25: data.weights: found {'code': 0}, expected a dict (name: a number > 0) or None; leave",
    ),
    (
        "",
        "data['weights'] = 3",
        "25: data.weights: found 3, expected a dict (name: a number > 0) or None; leave weights out",
    ),
    ("", "model_type = 'MIXTRAL'", "25: model_type: found 'MIXTRAL', expected one of 'INTERNLM', 'INTERNLM2',"),
    ("", "data[3] = 4", "25: data.3: unknown key; keys of data: seq_len, source_seq_len, row_pairs,"),
    (
        "",
        "hybrid_zero_optimizer = dict(grad_dtype='torch.tf32')",
        '25: hybrid_zero_optimizer.grad_dtype: found "torch.tf32", which no tensor is stored in; use',
    ),
    ("", "model['num_layers'] = 4.5", "25: model.num_layers: found 4.5, expected an integer > 0; change the value"),
    ("data = dict(", "DATA = dict(", "13: the config file failed while running: NameError: name 'data' is not defined"),
    ("", "grad_scaler = None", '19: model.dtype: found "torch.float16" without grad_scaler; add grad_scaler ='),
    ("", "raise KeyError('x')", "25: the config file failed while running: KeyError: 'x'"),
    (
        "",
        "import os; os.environ['NO_SUCH']",
        "25: the environment variable NO_SUCH is not set; export it before starting",
    ),
    ("", "x = (1", "25: not valid Python: '(' was never closed"),
    ("", "y = SEQ_LENN", "25: the config file failed while running: NameError: name 'SEQ_LENN' is not defined"),
    ("", "import nothing_like_it", "25: the config file failed while running: ModuleNotFoundError: No module named"),
    ("", "_base_ = 3", '25: _base_: found 3, expected a file name or a list of them, such as "base.py"'),
    ("", "_base_ = 'no.py'", "25: _base_: found no file no.py; the path starts at this file's folder"),
    ("", "exit(3)", "25: the config file failed while running: SystemExit: 3"),
    ("", "return 3", "25: not valid Python: 'return' outside function"),
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(text: str, world: int | None = WORLD) -> list[str]:
    """The lines of the error that a config with this text gives; [] when it is good."""
    Path("bad.py").write_text(text)
    try:
        check_config(load_config(Path("bad.py")), world)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_good_config() -> None:
    assert problems(GOOD) == []


@pytest.mark.timeout(60)  # none of them may keep the checks busy
@pytest.mark.parametrize(("old", "new", "expected"), BAD, ids=[new for _, new, _ in BAD])
def test_bad_config(old: str, new: str, expected: str) -> None:
    assert not old or GOOD.count(old) == 1
    found = problems(GOOD.replace(old, new) if old else GOOD + new + "\n")
    assert any(line.startswith(f"bad.py:{expected}") for line in found), "\n".join(found)


def test_all_problems_at_once() -> None:
    text = GOOD
    for old, new in {
        "seq_len=SEQ_LEN": "seq_lenn=SEQ_LEN",
        "micro_num=4": "micro_num='4'",
        "max_scale=2**24": "max_scale=-1",
        "adam = dict(lr=1e-4)": "optimizer = dict(lr=1e-4)",
        "vocab_size=512": "vocab_size=True",
        "zero1=-1": "zero1=dict(sizee=2)",
        "tensor=2": "pipe=2",
    }.items():
        text = text.replace(old, new)
    assert [line.split(": ")[1] for line in problems(text)] == [
        "parallel.zero1",
        "data.micro_num",
        "data.seq_lenn",
        "grad_scaler.max_scale",
        "optimizer.lr",
        "model.vocab_size",
        "parallel.pipe",
    ]


def test_wrong_keys_and_combinations_in_one_error() -> None:
    text = GOOD.replace("micro_num=4", "micro_num='4', skip_batches='9-1', rampup_batch_size='3 2 1'")
    text = text.replace("hidden_size=128", "hidden_size=129").replace("tensor=2", "tensor=2.0")
    found = problems(text)
    assert [line.split(": ")[1] for line in found] == [
        "data.micro_num",
        "parallel.tensor",
        "model.hidden_size",
        "data.skip_batches",
    ], "what depends on a wrong key (ramp-up on micro_num, heads on tensor) is left out"


def test_all_combinations_at_once() -> None:
    text = GOOD.replace("num_attention_heads=8", "num_attention_heads=7").replace("zero1=-1", "zero1=3")
    text = text.replace("eta_min=1e-5", "init_steps=100")
    keys = {line.split(": ")[1] for line in problems(text)}
    assert keys == {
        "parallel.zero1",
        "model.hidden_size",
        "model.num_attention_heads",
        "lr_scheduler.init_steps",
    }


def test_missing_sections() -> None:
    assert problems("JOB_NAME = 'x'\n") == [
        "bad.py: data: missing; add data = dict(seq_len=...)",
        "bad.py: model: missing; "
        "add model = dict(num_attention_heads=..., vocab_size=..., hidden_size=..., num_layers=...)",
    ]


def test_wrong_value_is_reported_once_despite_derived_default() -> None:
    text = GOOD.replace('total_steps=data["total_steps"], ', "").replace("total_steps=100", "total_steps=0")
    assert [line.split(": ")[1] for line in problems(text)] == ["data.total_steps"]


def test_layers_per_stage() -> None:
    text = GOOD.replace("num_layers=4", "num_layers=3, num_chunks=2").replace("tensor=2", "pipeline=2")
    assert problems(text, 4) == [
        "bad.py:18: model.num_layers: found 3, expected at least parallel.pipeline.size 2 * model.num_chunks 2 = 4, "
        "a layer for each; change one of them"
    ]
    assert problems(text.replace("num_layers=3", "num_layers=4"), 4) == []


@pytest.mark.parametrize(
    ("chunks", "pipeline", "good"),
    [
        (1, "size=2", True),
        (1, "size=2, schedule='1f1b'", True),
        (1, "size=2, interleaved_overlap=False", True),
        (2, "size=2", True),
        (2, "size=2, interleaved_overlap=False", True),
        (2, "size=2, schedule='interleaved'", True),
        (2, "size=2, schedule='zbv'", True),
        (2, "size=2, schedule='1f1b'", False),
        (1, "size=2, schedule='zbv'", False),
        (3, "size=2, schedule='zbv'", False),
    ],
)
def test_schedule_and_chunks(chunks: int, pipeline: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "version", lambda package: "2.13.0")
    text = GOOD.replace("num_layers=4", f"num_layers=8, num_chunks={chunks}")
    found = problems(text.replace("tensor=2", f"pipeline=dict({pipeline})"))
    assert [line.split(": ")[1] for line in found] == ([] if good else ["model.num_chunks"])


def test_zbv_needs_interleaved_overlap() -> None:
    text = GOOD.replace("num_layers=4", "num_layers=4, num_chunks=2")
    text = text.replace("tensor=2", "pipeline=dict(size=2, schedule='zbv', interleaved_overlap=False)")
    assert problems(text) == [
        'bad.py:23: parallel.pipeline.interleaved_overlap: found False with parallel.pipeline.schedule "zbv", which '
        'always receives early; set it to True, or take "interleaved"'
    ]


def test_old_torch_lacks_some_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "version", lambda package: "2.12.1+cu128")
    text = GOOD.replace("num_layers=4", "num_layers=4, num_chunks=2")
    assert problems(text.replace("tensor=2", "pipeline=dict(size=2, interleaved_overlap=False)")) == [
        "bad.py:23: parallel.pipeline.interleaved_overlap: found False with torch 2.12.1+cu128, expected torch 2.13 or "
        "newer; set it to True"
    ]
    assert problems(text.replace("tensor=2", "pipeline=dict(size=2)")) == []
    assert problems(text.replace("tensor=2", "pipeline=dict(size=2, schedule='zbv')")) == [
        'bad.py:23: parallel.pipeline.schedule: found "zbv" with torch 2.12.1+cu128, expected torch 2.13 or newer; '
        'install it, or take "interleaved"'
    ]


@pytest.mark.parametrize("found", [None, "2.12.0-internal", PackageNotFoundError("torch")])
def test_unknown_torch_version_is_accepted(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "version", Mock(side_effect=[found]))
    text = GOOD.replace("num_layers=4", "num_layers=4, num_chunks=2")
    assert problems(text.replace("tensor=2", "pipeline=dict(size=2, interleaved_overlap=False)")) == []


def test_sequence_parallel_divisibility() -> None:
    text = GOOD.replace("SEQ_LEN = 128", "SEQ_LEN = 127").replace("tensor=2", "tensor=2, sequence_parallel=True")
    assert problems(text) == [
        "bad.py:23: parallel.sequence_parallel: found True with rows of micro_bsz * seq_len = 127 tokens, expected a "
        "multiple of parallel.tensor 2; change one of them"
    ]
    assert problems(text.replace("micro_num=4", "micro_num=4, micro_bsz=2")) == []


WINDOWS = [
    ("sliding_window=0", "model.sliding_window: found 0, expected an integer > 0"),
    ("sliding_window=2.5", "model.sliding_window: found 2.5, expected an integer > 0"),
    ("sliding_window=2**40", "model.sliding_window: found 1099511627776, expected at most 2147483647"),
    ("layer_types=['sliding_attention']", "model.sliding_window: found None with sliding layers in model.layer_types"),
    ("sliding_window=9, layer_types=[]", "model.layer_types: found []"),
    ("sliding_window=9, layer_types=['chunked_attention']", "model.layer_types: found"),
    (
        "sliding_window=9, layer_types=['full_attention'] * 4 + ['sliding_attention']",
        "model.sliding_window: found 9, but no layer is sliding by model.layer_types; remove one of them",
    ),
    ("attention_softcap=0", "model.attention_softcap: found 0, expected"),
    ("attention_softcap=-1.0", "model.attention_softcap: found -1.0, expected"),
    ("attention_scale=0.0", "model.attention_scale: found 0.0, expected"),
    (
        "sliding_window=9, attention='cudnn'",
        'model.sliding_window: found 9 with model.attention "cudnn", whose kernel does not have it; take "auto"',
    ),
    (
        "attention_softcap=9.0, attention='torch_varlen'",
        'model.attention_softcap: found 9.0 with model.attention "torch_varlen", whose kernel does not have it',
    ),
    ("window_size=9", "model.window_size: unknown key; nearest known key: model.sliding_window"),
    (
        "attn_logit_softcapping=50.0",
        "model.attn_logit_softcapping: unknown key; nearest known key: model.attention_softcap",
    ),
    ("sliding_window=9, layer_types=['full_attention', 'sliding_attention'], attention_scale=0.2", None),
    ("layer_types=['full_attention']", None),
]


@pytest.mark.parametrize(("keys", "found"), WINDOWS, ids=[keys for keys, _ in WINDOWS])
def test_windows_caps_and_scales_that_cannot_be(keys: str, found: str | None) -> None:
    told = problems(GOOD.replace("num_layers=4", f"num_layers=4, {keys}"))
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]


FEED_FORWARD_AND_HEAD = [
    ("mlp_type='geglu'", None),
    ("mlp_type='gelu_tanh', mlp_bias=True, head_bias=True, logit_scale=0.5, logit_softcap=30, embed_scale=11.3", None),
    ("mlp_type='swiglo'", "model.mlp_type: found 'swiglo', expected one of 'swiglu', 'geglu', 'geglu_tanh', 'gelu', "),
    ("mlp_type='gelu_new'", "model.mlp_type: found 'gelu_new', expected one of "),
    ("mlp_type=None", "model.mlp_type: found None, expected one of "),
    ("mlp_bias=1", "model.mlp_bias: found 1, expected True or False"),
    ("mlp_bias=None", "model.mlp_bias: found None, expected True or False"),
    ("head_bias='no'", "model.head_bias: found 'no', expected True or False"),
    ("logit_scale=0", "model.logit_scale: found 0, expected a number > 0 or None"),
    ("logit_scale=-0.5", "model.logit_scale: found -0.5, expected a number > 0 or None"),
    ("logit_softcap=0.0", "model.logit_softcap: found 0.0, expected a number > 0 or None"),
    ("logit_softcap=-30", "model.logit_softcap: found -30, expected a number > 0 or None"),
    ("logit_softcap=True", "model.logit_softcap: found True, expected a number > 0 or None"),
    ("embed_scale=0", "model.embed_scale: found 0, expected a number > 0 or None"),
    ("embed_scale=float('nan')", "model.embed_scale: found nan, expected"),
    (
        "embed_scale=1e5",
        'model.embed_scale: found 100000.0 with model.dtype "torch.float16", expected a number between',
    ),
    (
        "embed_scale=1e-9",
        'model.embed_scale: found 1e-09 with model.dtype "torch.float16", expected a number between',
    ),
    ("hidden_act='silu'", "model.hidden_act: unknown key; nearest known key: model.mlp_type"),
    ("final_logit_softcapping=30.0", "nearest known key: model.logit_softcap"),
    ("z_loss_weight=1e-4", "nearest known key: loss.z_loss"),
]


@pytest.mark.parametrize(("keys", "found"), FEED_FORWARD_AND_HEAD, ids=[keys for keys, _ in FEED_FORWARD_AND_HEAD])
def test_feed_forward_parts_and_heads_that_cannot_be(keys: str, found: str | None) -> None:
    told = problems(GOOD.replace("num_layers=4", f"num_layers=4, {keys}"))
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]


DROPOUT = [
    ("embedding_dropout=1", "model.embedding_dropout: found 1, expected a number >= 0 and < 1"),
    ("residual_dropout=1.0", "model.residual_dropout: found 1.0, expected a number >= 0 and < 1"),
    ("residual_dropout=-0.1", "model.residual_dropout: found -0.1, expected a number >= 0 and < 1"),
    ("attention_dropout=10", "model.attention_dropout: found 10, expected a number >= 0 and < 1"),
    ("attention_dropout=None", "model.attention_dropout: found None, expected a number >= 0 and < 1"),
    ("embedding_dropout='0.1'", "model.embedding_dropout: found '0.1', expected a number >= 0 and < 1"),
    ("residual_dropout=True", "model.residual_dropout: found True, expected a number >= 0 and < 1"),
    ("residual_dropout=float('nan')", "model.residual_dropout: found nan, expected a number"),
    *(
        (
            f"attention_dropout=0.1, attention='{kernel}'",
            f'model.attention_dropout: found 0.1 with model.attention "{kernel}", which drops attention weights by',
        )
        for kernel in ("flash_attn_3", "flash_attn_4", "flash_attn", "cudnn", "torch_varlen")
    ),
    ("resid_pdrop=0.1", "model.resid_pdrop: unknown key; nearest known key: model.residual_dropout"),
    ("attn_pdrop=0.1", "model.attn_pdrop: unknown key; nearest known key: model.attention_dropout"),
    ("embd_pdrop=0.1", "model.embd_pdrop: unknown key; nearest known key: model.embedding_dropout"),
    ("attention_dropout=0.1, attention='flash_attn', use_flash_attn=False", None),
    ("attention_dropout=0.1, attention='sdpa', embedding_dropout=0.5, residual_dropout=0.999", None),
    ("attention_dropout=0, attention='flash_attn', residual_dropout=0", None),
]


@pytest.mark.parametrize(("keys", "found"), DROPOUT, ids=[keys for keys, _ in DROPOUT])
def test_dropout_that_cannot_be(keys: str, found: str | None) -> None:
    told = problems(GOOD.replace("num_layers=4", f"num_layers=4, {keys}"))
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]


LOCAL = "sliding_window=9, layer_types=['full_attention', 'sliding_attention']"
ROPE = "rope_scaling=dict(rope_type={!r}, factor=2.0{})".format
POSITIONS = [
    ("position='alibi'", "model.position: found 'alibi', expected one of 'rope', 'learned', 'sinusoidal', 'none'"),
    ("position='learned'", "model.max_position_embeddings: found None, expected the number of positions for 'learned'"),
    (
        "position='learned', max_position_embeddings=127",
        "model.max_position_embeddings: found 127, expected at least data.seq_len 128; change one of them",
    ),
    ("max_position_embeddings=0", "model.max_position_embeddings: found 0, expected an integer > 0"),
    ("max_position_embeddings=2**31", "model.max_position_embeddings: found 2147483648, expected at most 2147483647"),
    ("partial_rotary_factor=0", "model.partial_rotary_factor: found 0, expected"),
    ("partial_rotary_factor=1.5", "model.partial_rotary_factor: found 1.5, expected"),
    (
        "partial_rotary_factor=0.2",
        "model.partial_rotary_factor: found 0.2, which rotates 3 of 16 features per head, expected an even number",
    ),
    ("partial_rotary_factor=0.01", "which rotates 0 of 16 features per head, expected an even number, at least 2"),
    ("no_rope_every=-1", "model.no_rope_every: found -1, expected an integer >= 0"),
    ("rope_local_base=0", "model.rope_local_base: found 0, expected a number > 0"),
    ("rope_local_base=5e5", "model.rope_local_base: found 500000.0, but no layer is sliding; remove it, or set"),
    (
        "position='none', rope_scaling=dict(rope_type='linear', factor=2.0)",
        "model.rope_scaling: found with model.position 'none', which rotates nothing; remove it",
    ),
    ("position='sinusoidal', no_rope_every=4", "model.no_rope_every: found 4 with model.position 'sinusoidal', which"),
    ("position='none', partial_rotary_factor=0.5", "model.partial_rotary_factor: found 0.5 with model.position 'none'"),
    (f"position='none', rope_local_base=5.0, {LOCAL}", "model.rope_local_base: found 5.0 with model.position 'none'"),
    (ROPE("dynamic", ""), "original_max_position_embeddings: found None, expected the longest row of the first"),
    (ROPE("ntk", ""), "model.rope_scaling.rope_type: found 'ntk', expected one of"),
    (
        f"max_position_embeddings=9, partial_rotary_factor=0.125, {ROPE('dynamic', '')}",
        "model.rope_scaling.rope_type: found 'dynamic' with 2 rotated features per head, expected at least 4",
    ),
    ("position_embedding_type='absolute'", "nearest known key: model.position"),
    ("n_positions=1024", "model.n_positions: unknown key; nearest known key: model.max_position_embeddings"),
    ("use_dynamic_ntk_rope=True", "model.rope_scaling=dict(rope_type='dynamic', ...) is its name here"),
    ("position='learned', max_position_embeddings=128", None),
    ("max_position_embeddings=64", None),
    (f"max_position_embeddings=64, {ROPE('dynamic', '')}", None),
    (ROPE("dynamic", ", original_max_position_embeddings=64"), None),
    (f"rope_local_base=5e5, partial_rotary_factor=0.25, no_rope_every=4, {LOCAL}", None),
]


@pytest.mark.parametrize(("keys", "found"), POSITIONS, ids=[keys for keys, _ in POSITIONS])
def test_positions_that_cannot_be(keys: str, found: str | None) -> None:
    told = problems(GOOD.replace("num_layers=4", f"num_layers=4, {keys}"))
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]


@pytest.mark.parametrize("value", ["-1e-4", "True", "None", "'1e-4'", "float('inf')"])
def test_a_z_loss_that_cannot_be(value: str) -> None:
    (told,) = problems(f"{GOOD}loss = dict(z_loss={value})\n")
    assert "bad.py:25: loss.z_loss: found" in told and "expected a number >= 0" in told


@pytest.mark.parametrize(
    "keys",
    [
        "optimizer = dict(name='muon', muon_lr=float('inf'))",
        "optimizer = dict(name='sgd', momentum=float('inf'))",
        "lr_scheduler = dict(total_steps=100, warmup_steps=float('inf'))",
        "lr_scheduler = dict(total_steps=100, kind='wsd', decay_ratio=float('inf'))",
        "ema = float('inf')",
    ],
)
def test_infinity_is_no_rate(keys: str) -> None:
    """Where None stands for another value and not for "no limit"."""
    (told,) = problems(f"{GOOD}{keys}\n")
    assert "found inf, expected " in told


def test_learned_positions_end_where_samples_would() -> None:
    text = GOOD.replace("num_layers=4", "num_layers=4, position='learned', max_position_embeddings=128")
    samples = "monitor = dict(sample_prompts=['x'], sample_tokens={})\n".format
    text = text.replace("seq_len=SEQ_LEN", "seq_len=SEQ_LEN, tokenizer='small.model'")
    assert "monitor.sample_tokens: found 128, expected less than model.max_pos" in problems(text + samples(128))[0]
    assert problems(text + samples(127)) == []


def test_a_learned_table_is_split_over_tensor_parallel_ranks() -> None:
    text = GOOD.replace("num_attention_heads=8", "num_attention_heads=8, head_dim=16, embed_split_hidden=False")
    text = text.replace("hidden_size=128", "hidden_size=129")
    assert problems(text) == []
    (told,) = problems(text.replace("num_layers=4", "num_layers=4, position='learned', max_position_embeddings=128"))
    assert "model.hidden_size: found 129, expected a multiple of parallel.tensor 2" in told


FLOAT8 = GOOD.replace('"torch.float16"', '"torch.bfloat16", fp8=True')


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"torch.bfloat16"', '"torch.float32"', 'with model.dtype "torch.float32", expected "torch.bfloat16"'),
        (
            "hidden_size=128",
            "hidden_size=144",
            "matrices of 72 (model.num_attention_heads, model.head_dim, parallel.tensor) and 216",
        ),
        (
            "hidden_size=128",
            "hidden_size=128, multiple_of=8",
            "172 (model.multiple_of, model.mlp_ratio, parallel.tensor)",
        ),
        (
            "hidden_size=128",
            "hidden_size=128, mlp_type='gelu_tanh', mlp_ratio=4, multiple_of=1",
            "",
        ),
        (
            "hidden_size=128",
            "hidden_size=128, mlp_type='relu', mlp_ratio=4.1, multiple_of=4, mlp_bias=True",
            "262 (model.multiple_of, model.mlp_ratio, parallel.tensor)",
        ),
        ("num_attention_heads=8", "num_attention_heads=16, num_kv_attention_heads=2", ""),
        (
            "num_attention_heads=8",
            "num_attention_heads=32, num_kv_attention_heads=2",
            "72 (model.num_kv_attention_heads",
        ),
        ("SEQ_LEN = 128", "SEQ_LEN = 127", "127 (data.micro_bsz, data.seq_len) rows or columns on a rank, expected"),
    ],
)
def test_shapes_that_float8_products_do_not_take(old: str, new: str, found: str) -> None:
    assert problems(FLOAT8) == []
    told = problems(FLOAT8.replace(old, new))
    assert len(told) == bool(found) and all("model.fp8: found True " in line and found in line for line in told)


def test_interleaved_micro_num() -> None:
    text = GOOD.replace("num_layers=4", "num_layers=4, num_chunks=2").replace("tensor=2", "pipeline=2")
    assert problems(text.replace("micro_num=4", "micro_num=3"), 4)[0].startswith(
        "bad.py:5: data.micro_num: found 3, expected a multiple of parallel.pipeline.size 2"
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.py", "missing.py: cannot read the config file: No such file or directory"),
        (".", ".: found a folder, expected a Python config file"),
        ("config.yaml", "config.yaml: found the file name ending '.yaml', expected a Python config file, .py"),
    ],
)
def test_no_config_file(path: str, expected: str) -> None:
    Path("config.yaml").write_text("data: {}\n")
    with pytest.raises(ConfigError, match="^" + expected.replace(".", r"\.")):
        load_config(Path(path))


def test_torch_is_never_imported(tmp_path: Path) -> None:
    """A wrong config is refused before torch is loaded, within two seconds of a fresh interpreter."""
    (tmp_path / "bad.py").write_text(GOOD.replace("seq_len=SEQ_LEN", "seq_lenn=SEQ_LEN"))
    code = (
        "import sys; from pathlib import Path\n"
        "from internlm_lite.config import load, ranges, reference, render_config\n"
        "from internlm_lite.errors import ConfigError\n"
        "try: load.load_config(Path(sys.argv[1]))\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy')))\n"
    )
    root = Path(__file__).parents[2]
    arguments = [sys.executable, "-c", code, str(tmp_path / "bad.py")]
    found = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=60, check=True).stdout
    assert found.endswith("[]\n") and "nearest known key: data.seq_len" in found
