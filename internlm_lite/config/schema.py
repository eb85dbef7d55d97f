"""The sections and keys of a config file, with types, ranges and defaults.

The vocabulary is the InternLM demo configs'; keys that are new here say so. Cross checks between keys live in
`cross.py`, running the file in `source.py`. Docstrings below a key are the source of the config reference.
"""

from __future__ import annotations

import fractions
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from internlm_lite.units import round_up

UNKNOWN_TO_KERNELS = {"cudnn": ("sliding_window", "attention_softcap"), "torch_varlen": ("attention_softcap",)}
"""model.attention -> keys of `model` that this kernel does not have."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=3e38)]
"""A learning rate: the update multiplies by it in fp32, whose largest number is 3.4e38."""
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
ZeroStage = Annotated[int, Field(ge=1, le=3)]  # of numbers, Literal takes True and 2.0, too
Pair = Annotated[
    list[Annotated[float, Field(ge=0, lt=1)]],
    Field(min_length=2, max_length=2),
    BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value),
]
Dtype = Literal["torch.float16", "torch.half", "torch.bfloat16", "torch.float32", "torch.tf32", "torch.float64"]


class Section(BaseModel):
    """A lower-case dict of the config file: immutable, unknown keys refused, docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,  # "4" and True are not integers; an integer is a number
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class S3Config(Section):
    """(new) Access to checkpoint folders on S3. Credentials are never written here: they come from the variables
    S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY_ID, or from boto3's own chain."""

    insecure: bool = False
    """True: plain http to the ENDPOINT of a folder, instead of https."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """Position of the bucket's name: in the path, in the host name, or chosen by boto3."""
    checksums: Literal["md5", "crc32", "none"] = "md5"
    """Checksums of uploads. "md5": supported by all servers. "crc32": boto3's newer default. "none": for servers that
    refuse both. Checkpoints have checksums of their own in any case."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for which a request is repeated while the server is unreachable or overloaded."""


class CkptConfig(Section):
    """Saving and loading of checkpoints. Folders are `local:PATH`, a plain path, `boto3:s3://bucket.ENDPOINT/prefix`,
    or `s3://bucket/prefix`."""

    enable_save_ckpt: bool = False
    """Write checkpoints."""
    save_ckpt_folder: str | None = None
    """Folder that holds all checkpoints of this run; `--resume auto` looks here first."""
    load_ckpt_folder: str | None = None
    """Resume from this checkpoint (a save folder, or one checkpoint of it): weights, optimizer, data position."""
    load_model_only_folder: str | None = None
    """Start from the weights of this checkpoint, with a fresh optimizer, at step 0."""
    load_optimizer: bool = True
    """False: `load_ckpt_folder` gives weights and counters only, moments start at zero."""
    checkpoint_every: Positive | Literal["epoch"] | None = None
    """Steps between milestone checkpoints, which are kept. None: only the final one. (new) "epoch": after each pass
    over the training data, which data.weights exclude."""
    keep: Positive | None = None
    """(new) Newest milestones to keep; older ones are removed after a newer one is saved, except the final ones and
    the one that the run went on from. None: all."""
    keep_best: bool = False
    """(new) After an evaluation with a lower loss than any before, save a checkpoint of the kind "best". It stays until
    a better one is saved, besides those that the other keys ask for."""
    async_upload: bool = True
    """Write checkpoints in the background where the storage supports it."""
    async_upload_tmp_folder: str | None = None
    """Folder for temporary files of asynchronous uploads."""
    snapshot_ckpt_folder: str | None = None
    """Folder for snapshots, the rotating checkpoints; left out: save_ckpt_folder/snapshot."""
    oss_snapshot_freq: NonNegative | None = None
    """Steps between snapshots; 0 or None: none."""
    stop_file_path: str | None = None
    """File with one integer N, read while training: N > 0: save after step N and stop; N < 0: save after step -N and
    continue; 0: nothing. It is reset to 0 when handled."""
    allow_changed_data: bool = False
    """(new) Resume although the training data differ from those of the checkpoint."""
    allow_changed_schedule: bool = False
    """(new) Resume although another lr_scheduler.total_steps gives the next update another learning rate."""
    allow_changed_optimizer: bool = False
    """(new) Resume although optimizer.name is not that of the checkpoint: state that has the same meaning is kept, the
    rest starts at zero, as one line says."""
    auto_resume: bool = True
    """(new) Without `--resume`: True: continue from the newest checkpoint in save_ckpt_folder; False: ignore it."""
    s3: S3Config = S3Config()
    """(new) How folders on S3 are reached."""

    @property
    def checkpoint_steps(self) -> int:
        """checkpoint_every as a number of steps, which "epoch" becomes when the data are open (data/demand.py)."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else 0


class DataConfig(Section):
    """Training and validation data, and how they become batches."""

    seq_len: Positive
    """Longest attention span in tokens."""
    source_seq_len: Positive | None = None
    """(new) Encoder-decoder: longest source in tokens; a row of them has micro_bsz * source_seq_len. None: seq_len."""
    row_pairs: Positive | None = None
    """(new) Encoder-decoder: most pairs of a row, such as the sentences of a batch. With micro_bsz as large every row
    but the last has so many; with a smaller one a row may be full before. None: as many as fit."""
    truncate_pairs: bool = False
    """(new) Encoder-decoder: cut sides that are too long and keep their end mark. False: they are an error. Too long is
    a source of more than source_seq_len tokens, or a target of more than seq_len, without its begin mark."""
    micro_num: Positive = 1
    """Micro-batches per optimizer step on each data-parallel rank (gradient accumulation)."""
    micro_bsz: Positive = 1
    """A micro-batch is one packed row of micro_bsz * seq_len tokens."""
    valid_micro_num: Positive | None = None
    """Micro-batches per validation batch; None: micro_num."""
    valid_every: NonNegative | Literal["epoch"] = 0
    """Steps between evaluations; 0: never. (new) "epoch": after each pass over the training data, which data.weights
    exclude."""
    pack_sample_into_one: bool = False
    """False: attention stays inside each document. True: attention spans whole windows of seq_len."""
    total_steps: NonNegative = 0
    """Optimizer steps of the run. Left out, or 0: from epochs or total_tokens; exactly one of the three is given."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """(new) Passes over the training data, instead of total_steps: the run ends with the last batch that they fill.
    With weights or stages: so many times the tokens of all folders."""
    total_tokens: Positive | None = None
    """(new) Tokens to train on, instead of total_steps: the run ends with the batch that reaches them."""
    max_epochs: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """(new) Most passes over a data folder, or over each of those named. A run that would read more is refused at the
    start, with the passes it needs. None: no limit."""
    skip_batches: str = ""
    """Batch ids to drop, such as "1-3,7" (inclusive): consumed from the order, but not trained on."""
    rampup_batch_size: str = ""
    """"start increment every": `start` micro-batches, `increment` more every `every` steps, up to micro_num. (new)
    "start increment every tokens": `increment` more after each `every` tokens of the data order, over all ranks."""
    min_length: NonNegative = 0
    """Documents with fewer tokens are dropped."""
    train_folder: str | None = None
    """Folder of tokenised data; each sub-folder is one data folder of the report. None: the built-in dummy set."""
    valid_folder: str | None = None
    """Like train_folder, for evaluation. None with valid_every > 0: the built-in dummy set."""
    tokenizer: str | None = None
    """(new) Tokenizer the data were tokenised with: a sentencepiece .model, a tokenizer.json, vocab.json beside
    merges.txt, a .tiktoken file, or a folder with one of these. Checked against vocab_size, used for samples."""
    source_tokenizer: str | None = None
    """(new) Encoder-decoder: tokenizer of the sources. None: tokenizer."""
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """(new) Share of each data folder in the training mix, normalised; None: every document once per epoch."""
    valid_batches: Positive = 16
    """(new) At most this many validation batches per data folder."""
    valid_at_start: bool = False
    """(new) Evaluate before the first step, too."""
    valid_train_batches: NonNegative = 0
    """(new) Every evaluation also measures the loss on this many batches of training data, always the first of the data
    order. Moves neither the data position nor the curve."""

    @property
    def valid_steps(self) -> int:
        """valid_every as a number of steps, which "epoch" becomes when the data are open (data/demand.py)."""
        return 0 if self.valid_every == "epoch" else self.valid_every


class Fp16ScalerConfig(Section):
    """Loss scale of fp16 training."""

    initial_scale: Annotated[float, Field(gt=0)] = 65536
    """Loss scale of the first step."""
    min_scale: Annotated[float, Field(gt=0)] | None = None
    """The scale never falls below this; None: no floor."""
    growth_interval: Positive = 1000
    """Good steps in a row before the scale grows."""


class GradScalerConfig(Section):
    """Dynamic loss scaling; used only with model.dtype torch.float16."""

    fp16: Fp16ScalerConfig = Fp16ScalerConfig()
    """Start, floor and growth interval of the scale."""
    growth_factor: Annotated[float, Field(gt=1)] = 2
    """The scale grows by this factor."""
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The scale shrinks by this factor on overflow."""
    max_scale: Annotated[float, Field(gt=0)] | None = None
    """The scale never rises above this; None: no ceiling."""
    hysteresis: Positive = 2
    """Overflows tolerated before the scale shrinks."""


class HybridZeroConfig(Section):
    """Communication of the optimizer (ZeRO, `parallel.zero_stage`), clipping, and the dtype of gradients."""

    overlap_sync_grad: bool = True
    """Reduce gradient buckets while the backward pass still runs."""
    overlap_sync_param: bool = True
    """Gather updated parameters while the next forward pass starts."""
    reduce_bucket_size: Positive = 64 * 1024 * 1024
    """Elements per gradient bucket. Small ones hide more of their reduction behind the backward pass, which --dry-run
    --device h100 prints; much smaller ones cost more than they hide."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    grad_dtype: Dtype | None = None
    """(new) dtype that gradients of half-precision weights are summed and reduced in; others keep theirs.
    None: fp32 for bf16 models, fp16 for fp16 models."""


class LossConfig(Section):
    """Training loss."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    """Share of the probability mass spread evenly over the vocabulary."""
    pad_id: NonNegative | None = None
    """(new) With label_smoothing s: an id that no label has and smoothed targets give nothing: they are 1 - s of the
    label and s / (vocab_size - 2) of each other id. The step line's `loss` is then the Kullback-Leibler divergence (KL)
    from them, which leaves out their own entropy; `loss_from_metric` stays the cross-entropy. None: s / vocab_size of
    every id, and `loss` is the cross-entropy with it."""
    z_loss: Annotated[float, Field(ge=0)] = 0
    """(new) c: adds c * log(sum of exp(logits))^2 to the loss of each label, which keeps logits small (PaLM,
    arXiv:2204.02311: 1e-4). The step line's `loss` and `loss_from_metric` leave it out."""


class GroupConfig(Section):
    """Parameters with a learning rate, weight decay or betas of their own. Keys left out are those that the parameters
    have otherwise."""

    pattern: Annotated[str, Field(min_length=1)]
    """Names of parameters, as in checkpoints, with * ? [] as in file names: "*norm*", "layers.0.*". A parameter is in
    the first group that matches; a pattern for which none is left is an error."""
    lr: Rate | None = None
    """Peak learning rate, instead of adam.lr. The whole schedule, eta_min too, is scaled by lr / adam.lr. With
    model.scaling="mup" that of the base width, as weight_decay."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Instead of adam.weight_decay, and whatever adam.weight_decay_on says."""
    betas: Pair | None = None
    """[beta1, beta2] instead of adam.adam_beta1 and beta2_scheduler: this beta2 stays. Not for matrices of Muon."""


class OptimizerConfig(Section):
    """(new) What is done with a gradient. Learning rate, betas and weight decay come from `adam` for every rule."""

    name: Literal["adamw", "adamw_cs336", "lion", "sgd", "muon"] = "adamw"
    """Update rule. "adamw": in torch's order. "adamw_cs336": in the order of the handout of Stanford's CS336, with eps
    outside the bias correction and the decay after the step. "lion": the sign of a momentum (arXiv:2302.06675), half
    the optimizer state; wants a smaller adam.lr and a larger adam.weight_decay than AdamW; adam.adam_beta2 is the decay
    of the momentum. "sgd": the gradient itself, or its momentum; no other key of `adam` than lr and the weight decay,
    which is decoupled, too. "muon": matrices of the blocks change by their orthogonalised momentum (arXiv:2502.16982),
    those of a fused projection one by one; embedding, head, norms and biases by AdamW with `adam`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """sgd: momentum = this * momentum + gradient, as torch's; None: 0, which is without, and then without optimizer
    state. muon: momentum = this * momentum + (1 - this) * gradient; None: 0.95."""
    nesterov: bool | None = None
    """muon: orthogonalise optimizer.momentum * momentum + (1 - optimizer.momentum) * gradient, with the new momentum.
    None: True. False: the momentum."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """muon: steps of the Newton-Schulz iteration."""
    ns_dtype: Literal["torch.float32", "torch.bfloat16"] | None = None
    """muon: dtype of the iteration's products. None: bf16 on a GPU, fp32 on the CPU. A fp64 model iterates in fp64."""
    muon_lr: Rate | None = None
    """muon: peak learning rate of the matrices; it follows the schedule of adam.lr. None: adam.lr."""
    muon_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """muon: decoupled weight decay of the matrices. None: adam.weight_decay."""
    update_scale: Literal["rms", "spectral"] = "rms"
    """muon: factor of an orthogonalised matrix. "rms": 0.2 sqrt(max(rows, columns)), so that its elements are as large
    as AdamW's updates and adam.lr and adam.weight_decay suit both (arXiv:2502.16982). "spectral":
    sqrt(max(1, rows / columns)) (K. Jordan), for a muon_lr about ten times as large."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the rule's state; masters stay fp32. "bf16": half the memory, rounded at random, alike in every layout;
    an update takes longer. Not for muon."""
    groups: list[GroupConfig] = []
    """Parameters with hyperparameters of their own, by patterns of their names."""


class EmaConfig(Section):
    """(new) An exponential moving average (EMA) of the master weights: sharded and saved beside them, evaluated beside
    the weights, and read from checkpoints by `--weights ema` of `generate`, `convert` and `ckpt merge`."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Share of the average that one update leaves: it reaches over about 1 / (1 - decay) updates."""
    every: Positive = 1
    """Steps between updates of the average; after n updates of the weights its decay is decay to the power n."""
    warmup: bool = True
    """Begin with the smaller decay (1 + t) / (10 + t) after t updates, so that the first weights are soon forgotten."""


class AdamConfig(Section):
    """Learning rate, betas and weight decay of the update rule, see `optimizer`."""

    lr: Rate = 1e-4
    """Peak learning rate."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    adam_beta2_c: float = 0
    """Exponent of the beta2 schedule; <= 0: constant."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator (AdamW)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    weight_decay_on: Literal["matrices", "matrices_without_embeddings", "all"] = "matrices"
    """(new) "matrices": no decay of biases and norm weights. "matrices_without_embeddings": nor of tables of which rows
    are looked up: the embedding, also where the head shares it, and learned positions; a head of its own decays."""


class LrSchedulerConfig(Section):
    """Linear warm-up, then `kind`."""

    total_steps: NonNegative = 0
    """Step at which the rate reaches eta_min; left out: data.total_steps."""
    init_steps: NonNegative = 0
    """Steps with learning rate 0 before the warm-up."""
    warmup_ratio: Fraction | None = None
    """Share of total_steps used for warm-up. None: 0.01, unless warmup_steps or warmup_tokens is given."""
    warmup_steps: NonNegative | None = None
    """(new) Steps of the warm-up, instead of warmup_ratio."""
    warmup_tokens: NonNegative | None = None
    """(new) Tokens of the warm-up, instead of warmup_ratio: the first steps that take so many, over all ranks."""
    warmup_from_zero: bool = False
    """(new) The first of w warm-up steps has the learning rate 0 and the last adam.lr * (w - 1) / w (Megatron, Hugging
    Face). False: adam.lr / w and adam.lr (InternLM)."""
    kind: Literal["cosine", "wsd", "linear", "inverse_sqrt", "noam", "constant", "steps"] = "cosine"
    """(new) What follows a warm-up of W steps, t steps after it. "cosine", "linear": down to eta_min at total_steps.
    "wsd": adam.lr, and down to eta_min in the last decay_steps (warm-up, stable, decay: arXiv:2404.06395).
    "inverse_sqrt": adam.lr * sqrt(W / (W + t)), with W at least 1, and at least eta_min. "noam", warm-up included:
    adam.lr * noam_width^-0.5 * min(k^-0.5, k * W^-1.5) in step k = 1, 2, ... (arXiv:1706.03762). "constant": adam.lr.
    "steps": adam.lr times the factors of `step_factors`."""
    decay_steps: Positive | None = None
    """(new) wsd: steps of the decay, which ends at total_steps. None: decay_ratio says."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """(new) wsd: share of total_steps in which the rate falls. None: 0.1, unless decay_steps is given."""
    decay_shape: Literal["linear", "cosine", "1-sqrt", "exponential"] = "linear"
    """(new) wsd: how it falls, x from 0 to 1: 1 - x, (1 + cos(pi x)) / 2, 1 - sqrt(x) (arXiv:2405.18392), or by the
    same factor in each step, which takes an eta_min above 0."""
    step_factors: list[Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    """(new) steps: [[step, factor], ...]: from each step on the rate is adam.lr * factor; 1 before the first."""
    noam_width: Positive | None = None
    """(new) noam: its d_model; left out: model.hidden_size."""
    eta_min: Rate = 0.0
    """Final learning rate."""
    last_epoch: Annotated[int, Field(ge=-1)] = -1
    """Index of the last step already done by another run; -1: none."""

    @property
    def num_warmup_steps(self) -> int:
        """0 with warmup_tokens, until batch_sizes.with_warmup_steps has counted them."""
        if self.warmup_steps is not None or self.warmup_tokens is not None:
            return self.warmup_steps or 0
        return int(self.total_steps * (0.01 if self.warmup_ratio is None else self.warmup_ratio))

    @property
    def num_decay_steps(self) -> int:
        """Steps of the decay of "wsd"."""
        if self.decay_steps is not None:
            return self.decay_steps
        return max(1, int(self.total_steps * (0.1 if self.decay_ratio is None else self.decay_ratio)))


class Beta2SchedulerConfig(Section):
    """beta2(i) = max(init_beta2, 1 - i^-c)."""

    init_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Lower bound of beta2; left out: adam.adam_beta2."""
    c: float = 0
    """Exponent; <= 0: beta2 stays at init_beta2. Left out: adam.adam_beta2_c."""
    cur_iter: Annotated[int, Field(ge=-1)] = -1
    """Index of the last step already done by another run; -1: none."""


class RopeScaling(Section):
    """Rotary frequencies for rows longer than those a model was first trained on; `rope_scaling` in Hugging Face's
    config.json. Formulas: layers/rope.py."""

    rope_type: Literal["linear", "llama3", "yarn", "dynamic"]
    """linear: positions / factor. llama3: of long wavelengths alone, as in Llama 3.1. yarn: arXiv:2309.00071.
    dynamic: a larger base for documents beyond the original length, by their length (InternLM2 and 3)."""
    factor: Annotated[float, Field(ge=1)]
    """How much longer rows may be."""
    original_max_position_embeddings: Positive | None = None
    """llama3, yarn, dynamic: longest row of the first training. None, for dynamic: model.max_position_embeddings."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """llama3: wavelengths above original length / low_freq_factor are divided by factor."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """llama3: wavelengths below original length / high_freq_factor stay; in between, a linear mix."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """yarn: frequencies that turn more often than this within the original length stay."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """yarn: those that turn less often than this are divided by factor."""
    truncate: bool = True
    """yarn: round both borders to whole pairs."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """yarn: multiplies queries and keys. None: 0.1 ln(factor) + 1."""


class ModelConfig(Section):
    """The decoder: by default RMSNorm before each sub-layer, rotary attention, SwiGLU."""

    checkpoint: bool | Fraction | Literal["selective", "offload"] = False
    """Share of layers whose activations are recomputed in the backward pass (True: all). (new) "selective": of
    every layer what takes no matrix product, attention or message, which frees about half of the memory. "offload":
    likewise, and what is left of the first layers waits in pinned host memory for their backward pass."""
    offload_share: Fraction = 1.0
    """(new) With checkpoint="offload": the share of the layers, from the first, whose activations go to the host. The
    last layer's stay in any case, as its backward pass comes first."""
    num_attention_heads: Positive
    """Query heads."""
    num_kv_attention_heads: Positive | None = None
    """(new) Key/value heads of grouped-query attention; None: num_attention_heads."""
    head_dim: Positive | None = None
    """(new) Features of a head; None: hidden_size / num_attention_heads."""
    embed_split_hidden: bool = True
    """Tensor parallel: split the embedding along hidden_size (True) or along the vocabulary (False)."""
    vocab_size: Positive
    """Rows of the embedding and of the head."""
    embed_scale: Annotated[float, Field(gt=0)] | None = None
    """(new) Multiplies the token embedding, rounded to dtype first; sqrt(hidden_size) in Gemma. The weight of a tied
    head stays as it is. None: 1."""
    embed_grad_scale: Annotated[float, Field(ge=0)] = 1
    """a: the embedding output is a*e + (1-a)*e.detach(), which scales its gradient."""
    head_bias: bool = False
    """(new) A bias on the logits."""
    logit_scale: Annotated[float, Field(gt=0)] | None = None
    """(new) Multiplies the logits, their bias included. None: 1."""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """(new) c: logits z become c * tanh(z / c), after logit_scale (Gemma 2)."""
    parallel_output: bool = True
    """Tensor parallel: keep logits split along the vocabulary in the loss."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_layers: Positive
    """Blocks; of an encoder-decoder those of the decoder."""
    num_encoder_layers: NonNegative = 0
    """(new) Blocks of an encoder, in which every token sees all of its source; those of the decoder attend to its last
    hidden state, too. All else of this section is of both sides. 0: a decoder alone."""
    source_vocab_size: Positive | None = None
    """(new) Rows of the encoder's embedding. None: vocab_size."""
    tie_source_embeddings: bool = False
    """(new) The encoder shares the decoder's embedding; with tie_word_embeddings all three are one."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 8 / 3
    """Width of the feed-forward part = round_up(int(hidden_size * mlp_ratio), multiple_of)."""
    multiple_of: Positive = 256
    """(new) See mlp_ratio."""
    mlp_type: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """(new) Activation of the feed-forward part. The first three multiply it by a second projection: three matrices
    instead of two. "_tanh": gelu approximated by a tanh (GPT-2, Gemma)."""
    mlp_bias: bool = False
    """(new) Biases on all projections of the feed-forward part."""
    apply_post_layer_norm: bool = False
    """True: as norm_position "post"."""
    norm_position: Literal["pre", "post", "reordered", "sandwich"] | None = None
    """(new) Norms of a sub-layer f. "pre": x + f(norm(x)). "post": norm(x + f(x)), and no final norm. "reordered":
    x + norm(f(x)) (OLMo 2). "sandwich": x + norm2(f(norm1(x))) (Gemma 2). None: "pre", or as apply_post_layer_norm
    says."""
    dtype: Dtype = "torch.float16"
    """Weights and activations. torch.tf32: float32 weights, TF32 matrix products."""
    norm_type: Literal["rmsnorm", "layernorm", "sample_layernorm"] = "rmsnorm"
    """Normalisation, of all norms. (new) "layernorm": subtracts the mean, too (GPT-2). "sample_layernorm": divides by
    the sample's deviation plus layer_norm_epsilon (the annotated transformer; its epsilon is 1e-6)."""
    norm_bias: bool | None = None
    """(new) Biases of norms. None: but with norm_type="rmsnorm"."""
    zero_centered_norm: bool = False
    """(new) Norms multiply by 1 + weight, added in fp32; weights start at 0 (Gemma; Megatron's
    layernorm_zero_centered_gamma)."""
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square, or to the variance."""
    use_fp32_norm: bool = False
    """(new) Keep norm weights in fp32 when the model is half precision."""
    attention: Literal["auto", "flash_attn_3", "flash_attn_4", "cudnn", "flash_attn", "torch_varlen", "sdpa"] = "auto"
    """(new) Attention kernel. "auto": the first of the following that is installed and fits model and GPU. "cudnn":
    cuDNN's kernel over documents of 2048 and more tokens whose number is a multiple of 128, torch's varlen kernel over
    the others. "sdpa": the reference, one call per document."""
    use_flash_attn: bool = True
    """False: as attention="sdpa"."""
    compile: bool | None = None
    """(new) torch.compile what is before and after attention in a block, and the loss: fewer kernels, less traffic, and
    a start that takes a minute longer. Rounds differently. Training passes only; with parallel.tensor > 1, or zbv, only
    the rotation and the product of the feed-forward part. None: on GPUs where Triton and a C compiler are installed."""
    fp8: bool = False
    """(new) Matrix products of the blocks in float8 (e4m3, gradients e5m2), a scale per tensor. Weights, checkpoints,
    attention, embedding and head stay in dtype, which must be bf16. On H100, L40S, RTX 4090 and newer; the CPU emulates
    the rounding. Fast with compile. Training passes only; MFU still counts against the peak of bf16."""
    num_chunks: Positive = 1
    """Stages per pipeline rank; > 1: interleaved schedule, unless parallel.pipeline.schedule is "zbv"."""
    no_bias: bool = False
    """(new) True: attention without biases (Llama, InternLM2). False: biases on QKV and output (InternLM)."""
    qkv_bias: bool | None = None
    """(new) Biases on queries, keys and values (Qwen2). None: as no_bias says."""
    out_bias: bool | None = None
    """(new) Bias on attention's output. None: as no_bias says."""
    qk_norm: Literal[False, "head", "full"] = False
    """(new) Norms of queries and of keys, of norm_type, before the rotation. "head": over each head, one weight for all
    heads (Qwen3). "full": over the features of all heads (OLMo 2)."""
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """(new) "rope": rotary queries and keys. "learned": a weight per position, added to the token's embedding (GPT-2).
    "sinusoidal": fixed values instead, sines in even and cosines in odd columns (layers/positions.py). "none": the
    causal mask alone."""
    max_position_embeddings: Positive | None = None
    """Positions that position="learned" has weights for, at least data.seq_len; the original length of rope_type
    "dynamic", if that does not name it. Others have no largest position."""
    rope_base: Annotated[float, Field(gt=0)] = 10000
    """(new) Base of the rotary embedding."""
    rope_local_base: Annotated[float, Field(gt=0)] | None = None
    """(new) Base in sliding layers, whose frequencies rope_scaling does not change then (Gemma 3, OLMo 3). None: they
    are rotated as the others."""
    rope_scaling: RopeScaling | None = None
    """(new) Scaled rotary frequencies, as in Llama 3.1."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1
    """(new) Of a head, the first int(head_dim * factor) features are rotated."""
    no_rope_every: NonNegative = 0
    """(new) n: every n-th layer (n, 2n, ...) has no rotary embedding (SmolLM3: 4). 0: all have it."""
    sliding_window: Positive | None = None
    """(new) Sliding layers: a token attends to itself and the sliding_window - 1 tokens before it; in an encoder to as
    many behind it, too. None: no layer."""
    layer_types: Annotated[list[Literal["full_attention", "sliding_attention"]], Field(min_length=1)] | None = None
    """(new) Kinds of the layers, repeated over them. None: with sliding_window, all are sliding."""
    attention_softcap: Annotated[float, Field(gt=0)] | None = None
    """(new) c: a score s of query and key becomes c * tanh(s / c) (Gemma 2). Of the kernels, flash-attn's alone know
    it; without them scores are computed block by block, exactly but slowly."""
    attention_scale: Annotated[float, Field(gt=0)] | None = None
    """(new) Scale of the scores; None: head_dim ** -0.5. Gemma's is query_pre_attn_scalar ** -0.5."""
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """(new) Share of the embedding's output that is dropped in training. Masks of all dropout are a function of seed,
    step, layer, token and feature: the same in every layout, after a resume, and where layers run again."""
    residual_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """(new) Share of what attention and feed-forward part add to the residual stream that is dropped in training."""
    feed_forward_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """(new) Share of the inner features of the feed-forward part, behind its activation, that is dropped in training
    (the annotated transformer)."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """(new) Share of the attention weights that is dropped in training. No kernel has such masks: attention is then
    computed in plain operations, block by block, which is slower."""
    tie_word_embeddings: bool = False
    """(new) The head shares the embedding's weight."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """(new) Standard deviation of matrices at start; output projections are scaled by 1/sqrt(2*num_layers)."""
    scaling: Literal["standard", "mup"] = "standard"
    """(new) "mup": learning rate, weight decay and init_std found at the width mup_base_width suit this hidden_size,
    m times as large (maximal update parametrisation, arXiv:2203.03466, table 8; for AdamW, Lion and Muon). Matrices of
    the blocks start with init_std / sqrt(m) and train, unless by Muon, with adam.lr / m and adam.weight_decay * m;
    logit_scale is 1 / m, attention_scale sqrt(mup_base_head_dim) / head_dim; all else stays as it is."""
    mup_base_width: Positive | None = None
    """(new) hidden_size of the model whose hyperparameters are used; required with scaling="mup"."""
    mup_base_head_dim: Positive | None = None
    """(new) Its features per head; None: as many as here."""

    @model_validator(mode="before")
    @classmethod
    def _fill_mup_scales(cls, values: Any) -> Any:
        """Multipliers are ordinary keys, so that all that reads a model's function sees them."""
        if not isinstance(values, dict) or values.get("scaling") != "mup":
            return values
        counts = {key: value for key, value in values.items() if type(value) is int and value > 0}
        filled, width, base = dict(values), counts.get("hidden_size", 0), counts.get("mup_base_width", 0)
        if width and base and base != width and values.get("logit_scale") is None:
            filled["logit_scale"] = base / width
        head_dim = counts.get("head_dim") or width // counts.get("num_attention_heads", width + 1)
        if head_dim and "mup_base_head_dim" in counts and values.get("attention_scale") is None:
            filled["attention_scale"] = counts["mup_base_head_dim"] ** 0.5 / head_dim
        return filled

    @property
    def width_multiplier(self) -> float:
        """m of `scaling`; 1 without."""
        return self.hidden_size / self.mup_base_width if self.scaling == "mup" and self.mup_base_width else 1.0

    @property
    def hidden_std(self) -> float:
        """Standard deviation of the matrices of blocks at start."""
        return self.init_std / self.width_multiplier**0.5

    @property
    def kv_heads(self) -> int:
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_blocks(self) -> int:
        """Blocks of both sides. Their numbers in the whole model: first those of the encoder, then those of the
        decoder."""
        return self.num_encoder_layers + self.num_layers

    def in_encoder(self, layer: int) -> bool:
        """Whether layer `layer` of the whole model is one of the encoder."""
        return layer < self.num_encoder_layers

    def on_its_side(self, layer: int) -> int:
        """The number of layer `layer` of the whole model among those of the encoder, or of the decoder."""
        return layer if self.in_encoder(layer) else layer - self.num_encoder_layers

    @property
    def vocab_sizes(self) -> int | tuple[int, int]:
        """vocab_size; of an encoder-decoder that of the targets and that of the sources."""
        return (self.vocab_size, self.source_vocab) if self.num_encoder_layers else self.vocab_size

    @property
    def source_vocab(self) -> int:
        """Rows of the encoder's embedding."""
        return self.source_vocab_size or self.vocab_size

    def is_sliding(self, layer: int) -> bool:
        """Whether layer `layer` of the whole model attends to a window of sliding_window tokens."""
        if self.sliding_window is None:
            return False
        kinds = self.layer_types
        return kinds is None or kinds[self.on_its_side(layer) % len(kinds)] == "sliding_attention"

    def window(self, layer: int) -> int | None:
        """Tokens that a query of the layer sees, its own among them; None: all of its document."""
        return self.sliding_window if self.is_sliding(layer) else None

    def attention_pairs(self, layer: int, seq_len: int) -> int:
        """Pairs of query and key that FLOPs count in a document of S tokens. Full attention: all S^2, masked or not. A
        window W < S: the W * S - W * (W - 1) / 2 pairs in it and, likewise, their mirrors beyond the diagonal."""
        window = min(self.window(layer) or seq_len, seq_len)
        return window * (2 * seq_len - window + 1) - seq_len

    @property
    def most_positions(self) -> int | None:
        """Longest document that the model can read; None: of any length."""
        return self.max_position_embeddings if self.position == "learned" else None

    @property
    def rotary_size(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def norms_at(self) -> Literal["pre", "post", "reordered", "sandwich"]:
        """`norm_position`, said by one of its two keys."""
        return self.norm_position or ("post" if self.apply_post_layer_norm else "pre")

    @property
    def has_norm_bias(self) -> bool:
        return self.norm_type != "rmsnorm" if self.norm_bias is None else self.norm_bias

    @property
    def has_qkv_bias(self) -> bool:
        return not self.no_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_out_bias(self) -> bool:
        return not self.no_bias if self.out_bias is None else self.out_bias

    @property
    def gated_mlp(self) -> bool:
        """The feed-forward part has a second projection, by which the activation is multiplied."""
        return "glu" in self.mlp_type

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the feed-forward part; 13824 for the 20B model."""
        return round_up(int(self.hidden_size * self.mlp_ratio), self.multiple_of)

    @property
    def has_dropout(self) -> bool:
        shares = self.embedding_dropout, self.residual_dropout, self.feed_forward_dropout, self.attention_dropout
        return any(shares)

    @property
    def recomputed_share(self) -> float:
        """Of the layers, whose matrix products run again in the backward pass."""
        return 0.0 if isinstance(self.checkpoint, str) else float(self.checkpoint)

    @property
    def recomputes_cheap(self) -> bool:
        """Selective recomputation: layers/recompute.py."""
        return self.checkpoint in ("selective", "offload")

    @property
    def offloaded_layers(self) -> int:
        """How many of the first layers keep their activations on the host."""
        if self.checkpoint != "offload":
            return 0
        return min(round(self.offload_share * self.num_blocks), self.num_blocks - 1)

    @property
    def recomputed_layers(self) -> int:
        """How many of the first layers run again in the backward pass."""
        return round(self.recomputed_share * self.num_blocks)

    @property
    def embedding_by_vocabulary(self) -> bool:
        """Split along the vocabulary: a tied head reads the weight by its rows."""
        return self.tie_word_embeddings or not self.embed_split_hidden

    @property
    def torch_dtype_name(self) -> str:
        """Storage dtype as the attribute of `torch`: "torch.half" -> "float16", "torch.tf32" -> "float32"."""
        return {"torch.half": "float16", "torch.tf32": "float32"}.get(self.dtype, self.dtype.removeprefix("torch."))


class PipelineConfig(Section):
    """Pipeline parallelism."""

    size: Positive = 1
    """Pipeline-parallel ranks; each holds model.num_chunks stages."""
    schedule: Literal["1f1b", "interleaved", "zbv"] | None = None
    """(new) Order of the micro-batches. "1f1b": one stage a rank. "interleaved": model.num_chunks stages a rank.
    "zbv": zero bubble, two stages a rank in the shape of a V. None: interleaved with num_chunks > 1, else 1f1b."""
    interleaved_overlap: bool = True
    """Schedules with chunks: True: receive early, while something else is computed. False: receive right before use."""


class ContextConfig(Section):
    """(new) Context parallelism: the tokens of each row are cut over ranks; documents never leak."""

    size: Positive = 1
    """Context-parallel ranks, neighbours that hold the same weights. Each has micro_bsz * seq_len / size tokens of a
    row, and as much attention work as the others, whatever the documents. Optimizer state is shared over these and the
    data-parallel ranks."""
    exchange: Literal["gather", "ring", "ulysses"] = "gather"
    """How queries meet the keys of other ranks. "gather": keys and values of all ranks are gathered in each layer.
    "ring": those that some query of another rank sees travel to it while others are computed. "ulysses": ranks exchange
    tokens for heads: every rank computes the whole row for its query heads, which size must divide."""


class ParallelConfig(Section):
    """The layout: world size = data * context * tensor * pipeline."""

    zero1: int = -1
    """Ranks that share one copy of the optimizer state: <= 0 all ranks that hold the same weights (data times context
    parallel), 1 none, k a divisor of them."""
    zero_stage: ZeroStage = 1
    """(new) What these ranks share, besides the optimizer state. 2: gradients too, which are reduced after every
    micro-batch. 3: weights too, which are gathered block by block, before its forward pass and before its backward
    pass."""
    reshard_after_forward: bool = True
    """(new) With zero_stage=3: True: a block's weights are freed between its forward and its backward pass. False: they
    stay from the first forward pass of a step to the last backward pass: one gather a step, as much memory for weights
    as with zero_stage=2 meanwhile. A pipeline always keeps them."""
    tensor: Positive = 1
    """Tensor-parallel ranks, usually the GPUs of one node."""
    pipeline: PipelineConfig = PipelineConfig()
    """Pipeline-parallel ranks."""
    context: ContextConfig = ContextConfig()
    """Context-parallel ranks."""
    sequence_parallel: bool = False
    """Split activations outside attention and MLP along the sequence over the tensor-parallel ranks."""


class EngineConfig(Section):
    """(new) Who shards, reduces and updates. Model, data, loop, step line, guards and checkpoints are the same, and a
    run may go on with the other engine."""

    name: Literal["native", "deepspeed"] = "native"
    """"native": this package. "deepspeed": DeepSpeed's ZeRO, for tensor = pipeline = 1, with AdamW by torch's fused
    kernel; `pip install internlm_lite[deepspeed]`."""
    stage: ZeroStage = 1
    """deepspeed: what is sharded over data-parallel ranks. 1: optimizer state. 2: gradients, too. 3: weights, too."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """deepspeed: where master weights and optimizer state are, and where the update takes place. "cpu": in host memory.
    "nvme": in files, with stage 3; tensors of less than 1 MB stay in host memory."""
    nvme_path: str | None = None
    """deepspeed: folder of these files, on a disk of this host. They are of no use after the run."""
    overlap: bool = False
    """deepspeed: its overlap_comm: reduce beside the backward pass, on a GPU. Off, because releases of it gave wrong
    gradients with it: compare losses before you rely on it."""


class GuardConfig(Section):
    """(new) What happens on numerical problems. A step whose loss or gradient is not finite, or that has no label, is
    always skipped, and no checkpoint is saved whose numbers are not finite."""

    max_bad_steps: Positive | None = None
    """More consecutive skipped steps than this end the run with exit code 7; None: 50 for overflows with torch.float16,
    else 10."""
    spike: Literal["note", "skip", "rollback"] = "note"
    """What to do about a step whose loss or gradient norm is an outlier. "note": a warning and an event. "skip": also
    skip its update. "rollback": also return to the newest checkpoint before it, and continue with the data after it.
    With these two, a level that rises and stays ends the run, by max_bad_steps or max_rollbacks."""
    spike_zscore: Annotated[float, Field(ge=3)] = 12
    """Threshold of an outlier, in robust standard deviations of the logarithm."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Steps that a step is compared with."""
    max_rollbacks: Positive = 3
    """Rollbacks to one checkpoint; one more ends the run with exit code 7."""
    check_replicas_every: NonNegative = 100
    """Steps between comparisons of weights and optimizer state that several ranks hold; 0: never."""


class EvaluationConfig(Section):
    """(new) Tasks, scored while training and by tools/evaluate.py beside the loss on `data.valid_folder`. Neither
    changes the training."""

    tasks: list[str] = []
    """Built-in tasks made of the validation text (cloze_word, cloze_greedy, cloze_sentence), and tasks or groups of
    lm-evaluation-harness, where lm_eval is installed. An encoder-decoder has "pairs" alone: BLEU and chrF of what it
    makes of pairs_folder, by sacrebleu. Need data.tokenizer."""
    every: Positive | None = None
    """Steps between evaluations of the tasks; they are evaluated after the last step, too. None: with each evaluation
    of the validation data."""
    limit: Positive | None = None
    """Examples per task, the first ones. None: all; 200 of a cloze task."""
    include_path: str | None = None
    """Folder of task files in lm_eval's form (YAML), taken before those that come with it."""
    num_fewshot: NonNegative | None = None
    """Examples in a prompt of lm_eval's tasks. None: as each task says."""
    max_tokens: Positive | None = None
    """Longest text in tokens, the scored ones included; contexts are cut on the left. None: data.seq_len. Of "pairs"
    the longest source, which is cut before its end mark, and the longest target. None: as the data of training."""
    pairs_folder: str | None = None
    """Folder with the text of the pairs that "pairs" is scored on, as tools/tokenizer.py encode --pair reads it."""
    pairs_sides: Annotated[list[str], Field(max_length=2)] = []
    """Suffixes or keys of their sources and targets, such as ["de", "en"]; sacrebleu cuts words by the second one."""
    beams: Positive = 1
    """Of the search for a target. 1: greedy."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Of beams: > 0 favours long targets, < 0 short ones."""
    weights: Literal["model", "ema", "both"] = "model"
    """Which weights the tasks ask: the trained ones, their average (`ema`), or first the ones, then the other. Tasks of
    the average are named TASK@ema."""
    keep_best: str | None = None
    """Like ckpt.keep_best, by another figure: "loss", "acc", "perplexity", "bits_per_byte", the same of the averaged
    weights as "ema/loss", or "TASK/METRIC", such as "cloze_word/acc". Losses, perplexities and bits per byte are best
    when low, others when high, unless lm_eval says otherwise of its metric."""


class WandbConfig(Section):
    """(new) Weights & Biases; nothing is sent unless `mode` is "online". The key is never written here: `wandb login`
    stores it."""

    project: str = "internlm_lite"
    """Project of the run."""
    entity: str | None = None
    """Team or user; None: the login's own."""
    name: str | None = None
    """Name of the run; None: JOB_NAME and the name of the run folder."""
    group: str | None = None
    """Runs of a group are shown together."""
    tags: list[str] = []
    """Labels of the run."""
    mode: Literal["offline", "online"] = "offline"
    """"offline": written to the run folder, for `wandb sync`. "online": sent while training."""


class MlflowConfig(Section):
    """(new) MLflow. Passwords and tokens of the server are never written here: MLFLOW_TRACKING_USERNAME,
    MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN in the environment hold them."""

    experiment: str = "internlm_lite"
    """Experiment of the run; made if there is none."""
    tracking_uri: str | None = None
    """Address of the server, or a folder. None: MLFLOW_TRACKING_URI of the environment, else mlruns/ in the run
    folder."""
    run_name: str | None = None
    """Name of the run; None: JOB_NAME and the name of the run folder."""
    tags: dict[str, str] = {}
    """Tags of the run."""


class AlertsConfig(Section):
    """(new) Alerts about a run: in the log, in events.jsonl and to a webhook."""

    webhook: str | None = None
    """Address for alerts: https://... of a Feishu, Slack or compatible chat. A secret: always masked."""
    format: Literal["feishu", "slack"] | None = None
    """Format of the messages; None: by the webhook's host."""
    insecure: bool = False
    """True: the webhook may be plain http to another machine."""
    loss_factor: Annotated[float, Field(gt=1)] = 1.5
    """A loss above its average times this is an alert."""
    skips_in_a_row: Positive = 5
    """This many consecutive updates skipped because of overflow are an alert."""
    tgs_drop: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """A speed lower than usual by this share is an alert."""
    silent_seconds: Annotated[float, Field(gt=0)] = 300.0
    """No step for this time, and for 10 times the usual step time, is an alert."""
    cool_down_seconds: Annotated[float, Field(ge=0)] = 600.0
    """An alert is not raised again within this time after its end."""


class MonitorConfig(Section):
    """(new) What is shown, and how often."""

    log_every: Positive = 1
    """Steps between step lines; metrics are read from the device once per line."""
    sample_prompts: list[str] = []
    """Prompts continued at the end of the run, and every sample_every steps; needs data.tokenizer. An encoder-decoder
    takes them as sources, and the likeliest token each time."""
    sample_every: NonNegative | Literal["epoch"] = 0
    """Steps between continuations of the prompts; 0: only at the end. "epoch": after each pass over the training data,
    which data.weights exclude."""
    sample_tokens: Positive = 64
    """Tokens generated per prompt."""
    report_every_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Least number of seconds between rewrites of report.html in the run folder; 0: no report."""
    tensorboard: bool | None = None
    """Write event files for TensorBoard to the run folder; None: if tensorboard is installed."""
    wandb: WandbConfig | None = None
    """Weights & Biases; None: off."""
    mlflow: MlflowConfig | None = None
    """MLflow; None: off."""
    alerts: AlertsConfig = AlertsConfig()
    """Alerts."""


class StageConfig(Section):
    """(new) A stage of the run. What it leaves out is as `data`, `model` and `adam` say."""

    until: Positive | None = None
    """Id of the first batch after the stage, which is the step if no batch is skipped. Only the last stage may leave it
    out."""
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Share of each data folder. Folders left out are not read in this stage. None: data.weights."""
    seq_len: Positive | None = None
    """None: data.seq_len."""
    rope_base: Annotated[float, Field(gt=0)] | None = None
    """None: model.rope_base."""
    micro_bsz: Positive | None = None
    """None: data.micro_bsz."""
    lr: Rate | None = None
    """Peak learning rate; warm-up and decay run on over the whole run. None: adam.lr."""


class Config(Section):
    """A whole config file."""

    JOB_NAME: str = "default"
    """Name of the run: `RUN/<JOB_NAME>/<time>`."""
    seed: NonNegative = 1024
    """(new) Seed of weights and data order."""
    ckpt: CkptConfig = CkptConfig()
    """Checkpoints."""
    data: DataConfig
    """Data."""
    stages: list[StageConfig] = []
    """(new) Stages of the run, in order: mix, lengths, rotary base and peak lr change at a batch. Evaluations
    keep data.seq_len and data.micro_bsz. []: one stage."""
    grad_scaler: GradScalerConfig | None = None
    """Loss scaling, required for torch.float16."""
    hybrid_zero_optimizer: HybridZeroConfig = HybridZeroConfig()
    """Optimizer communication."""
    loss: LossConfig = LossConfig()
    """Loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    ema: EmaConfig | None = None
    """(new) Average of the weights; None: there is none."""
    adam: AdamConfig = AdamConfig()
    """Its learning rate, betas and weight decay."""
    lr_scheduler: LrSchedulerConfig
    """Learning rate."""
    beta2_scheduler: Beta2SchedulerConfig = Beta2SchedulerConfig()
    """beta2."""
    model: ModelConfig
    """Model."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout."""
    engine: EngineConfig = EngineConfig()
    """(new) Engine."""
    monitor: MonitorConfig = MonitorConfig()
    """Monitoring."""
    guard: GuardConfig = GuardConfig()
    """Guard."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Tasks."""
    deterministic: bool = False
    """(new) Repeat the same bits on a GPU: use only algorithms that add in a fixed order, which are slower, above all
    in the backward pass of attention. Without it a repeated or resumed run agrees to rounding; on a CPU to the bit."""
    cudnn_deterministic: bool = False
    """torch.backends.cudnn.deterministic."""
    cudnn_benchmark: bool = False
    """torch.backends.cudnn.benchmark."""

    @property
    def source_share(self) -> fractions.Fraction:
        """Source tokens of a row for each of its target tokens."""
        return fractions.Fraction(self.data.source_seq_len or self.data.seq_len, self.data.seq_len)

    @property
    def source_tokens(self) -> int:
        """Of a row of sources; 0 without an encoder."""
        length = self.data.source_seq_len or self.data.seq_len
        return self.data.micro_bsz * length if self.model.num_encoder_layers else 0

    @property
    def schedule(self) -> str:
        """parallel.pipeline.schedule, or what it stands for when it is left out."""
        return self.parallel.pipeline.schedule or ("interleaved" if self.model.num_chunks > 1 else "1f1b")
