"""Keys of other frameworks, as tables: a row is all there is to a key, and goes when the key gets a meaning here.

NO_EFFECT     keys of InternLM's and InternEvo's configs that change no number here, whatever their value
NO_EFFECT_IF  keys that change nothing with these values; any other value is refused
FEATURES      features that do not exist here, by the names that Megatron, DeepSpeed, torchtitan, nanotron, Hugging Face
              and InternEvo give them
OTHER_NAMES   names that the same frameworks give to keys of ours
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NO_EFFECT: Mapping[str, str] = {
    "adam.foreach": "there is one fused update",
    "adam.fused": "there is one fused update",
    "batch_count": "a run starts at batch 0, or where its checkpoint says",
    "ckpt.enable_internevo2hf_ckpt": "`internlm-lite convert to-hf` converts any checkpoint, at any time",
    "ckpt.need_metadata": "every checkpoint has an index of its tensors",
    "ckpt.universal_ckpt": "every checkpoint loads into every layout",
    "cluster_name": "speed is measured, not looked up",
    "clusters": "speed is measured, not looked up",
    "data.diag_outlier_ratio": "there is no periodic diagnosis of slow ranks",
    "data.drop_last": "a step always has a whole batch",
    "data.empty_cache_and_diag_interval": "the memory allocator's cache is left alone during training",
    "data.empty_cache_before_backward": "the memory allocator's cache is left alone during training",
    "data.empty_cache_before_optimizer": "the memory allocator's cache is left alone during training",
    "data.empty_cache_before_param_broadcast": "the memory allocator's cache is left alone during training",
    "data.fixed_random_dataset_seqlen": "the built-in dummy set has lengths of its own",
    "data.global_bsz": "data.micro_num, data.micro_bsz and the number of ranks say it",
    "data.lazy_load_attribute": "tokenised files have no attributes",
    "data.meta_folder": "the index of tokenised files lies beside them",
    "data.mmap_meta_stage": "the index of a tokenised file is read at the start",
    "data.num_worker": "one thread prepares the next batch",
    "data.packed_length": "a row has micro_bsz * seq_len tokens",
    "data.probe_size": "the number of tokens is read from the index",
    "data.random_dataset_num_samples": "the built-in dummy set never ends",
    "data.text_field": "training data are tokenised already",
    "data.tokenizer_path": "training data are tokenised already; data.tokenizer names a model for samples",
    "data.tokenizer_chunk_num": "training data are tokenised already",
    "data.unit_schedule_size": "parallel.pipeline.schedule says the order of micro-batches",
    "data.use_shm": "tokenised files are read through the page cache, which the ranks of a host share",
    "data.val_text_field": "training data are tokenised already",
    "data.valid_drop_last": "validation takes whole batches, at most data.valid_batches",
    "data.valid_packed_length": "a row has micro_bsz * seq_len tokens",
    "enable_tb": "monitor.tensorboard switches it",
    "fsdp_wrap_cls": "nothing is wrapped",
    "generation": "training does not generate with these; tools/generate.py takes them as arguments",
    "grad_profiling": "norms of single layers are not printed",
    "gradient_handler": "gradients of tied weights are always reduced",
    "hybrid_zero_optimizer.all_gather_size": "weights are gathered bucket by bucket",
    "hybrid_zero_optimizer.communication_dtype": "hybrid_zero_optimizer.grad_dtype says it",
    "hybrid_zero_optimizer.use_split_tensor_optim": "every bucket is divided evenly among the ranks",
    "layerwise": "the order of the work changes no number",
    "loss.moe_loss_coeff": "there are no experts to balance",
    "loss.moe_z_loss_coeff": "there are no experts to balance",
    "loss.op_type": "the loss is the same; its kernel is chosen by the device",
    "metric_dtype": "metrics are always summed in float32",
    "model.device": "--device chooses it",
    "model.dropout_selective_checkpoint": "masks are always computed again",
    "model.enable_qkv_fusion": "the result is the same with and without",
    "model.fused_dropout_add_ln": "the result is the same with and without",
    "model.mlp_layer_fusion": "the result is the same with and without",
    "model.moe_gate_k": "there are no experts",
    "model.moe_layer_kwargs": "there are no experts",
    "model.moe_type": "there are no experts",
    "model.moe_use_residual": "there are no experts",
    "moe": "there are no experts",
    "monitor.tensorboard.queue_max_length": "there is one queue for all sinks",
    "only_load_lr": "ckpt.load_optimizer says it",
    "pad_token_id": "rows are packed without padding",
    "parallel.expert": "there are no experts",
    "parallel.expert_weight": "there are no experts",
    "parallel.expert_zero1": "there are no experts",
    "parallel_check_freq": "guard.check_replicas_every says how often replicas are compared",
    "profile_fwd_bwd": "--profiling writes traces",
    "resume_tb_folder": "a restart goes on in its run folder",
    "selective_checkpoint": "model.checkpoint='selective' recomputes what is cheap, or a share of the layers",
    "tensorboard_folder": "event files are in the run folder",
    "timer_diag_interval": "there is no periodic diagnosis of slow ranks",
    "tokenizer_path": "training data are tokenised already; data.tokenizer names a model for samples",
    "tokenizer_type": "training data are tokenised already; data.tokenizer names the tokenizer for samples",
    "use_apex_adam": "there is one fused update",
}
_STD = ((0.02,), "model.init_std is the standard deviation of all matrices")
NO_EFFECT_IF: Mapping[str, tuple[Sequence[Any], str]] = {
    "data.always_bos": ((False,), "documents are trained on as they were tokenised"),
    "data.break_mode": (("cut",), "a long document is cut and goes on in the next row; there is no padding"),
    "data.is_multimodal": ((False,), "images are not supported"),
    "data.max_length_per_sample": ((-1,), "documents are not shortened; a long one is cut and goes on in the next row"),
    "data.repeat_dataset": ((1,), "data.total_steps says how long the data are repeated"),
    "data.sft": ((False,), "all tokens of a document have labels, but those that the tokenised file marks"),
    "data.train_one_epoch": ((False,), "data.total_steps says how long the data are repeated"),
    "data.type": (("tokenized",), "training data are tokenised folders: run tools/tokenizer.py first"),
    "data.use_flash_style_data_format": ((True,), "training rows are always packed"),
    "data.valid_pack_mode": ((None,), "validation rows are packed as training rows are"),
    "data.use_packed_dataset": ((True,), "training rows are always packed"),
    "full_kv_zigzag_with_full_dkv": ((False,), "parallel.context balances the work by itself"),
    "hybrid_zero_optimizer.partition_grad": ((False,), "parallel.zero_stage=2 shares gradients"),
    "model.adapt_hf": ((True,), "adapt_hf=False pairs neighbouring elements in the rotary embedding, here element i "
                                "with i + head_dim/2: remove it to train anew; convert weights trained with it"),
    "model.attention_type": (("GQA", "MHA"), "model.num_kv_attention_heads is the number of key and value heads"),
    "model.attn_other_init_std": _STD,
    "model.attn_wqkv_init_std": _STD,
    "model.causal": ((True,), "every layer of a decoder is causal: a token attends to itself and those before it"),
    "model.embedding_init_std": _STD,
    "model.ffn_other_init_std": _STD,
    "model.ffn_uplayer_init_std": _STD,
    "model.init_type": (("normal",), "matrices are drawn from a normal distribution, see model.init_std"),
    "model.is_causal": ((True,), "every layer of a decoder is causal: a token attends to itself and those before it"),
    "model.norm_head": ((False,), "the head's rows are not normalised"),
    "model.out_head_init_std": _STD,
    "model.qk_interleaved": ((False,), "the rotary embedding pairs element i with i + head_dim/2: convert weights"),
    "model.residual_in_fp32": ((False,), "residuals have model.dtype"),
    "model.use_amp": ((False,), "model.dtype is the one dtype of weights and activations"),
    "model.use_dynamic_ntk_rope": ((False,), "model.rope_scaling=dict(rope_type='dynamic', ...) is its name here"),
    "model.use_scaled_init": ((True,), "output projections are scaled by 1/sqrt(2*num_layers)"),
    "model.use_swiglu": ((True,), "model.mlp_type names the feed-forward part, by default SwiGLU"),
    "npu_fixedlen_flash_2d": ((False,), "rows are packed documents"),
    "output_tf32": ((False,), "the head has model.dtype; model.dtype='torch.tf32' is for the whole model"),
    "parallel.pipeline.decouple_grad": ((False,), "parallel.pipeline.schedule='zbv' separates the weight gradients"),
    "parallel.pipeline.use_zeropp": ((False,), "the nearest schedule is parallel.pipeline.schedule='zbv'"),
    "parallel.pipeline.zero_bubble": ((False,), "the zero-bubble schedule here is parallel.pipeline.schedule='zbv'"),
}  # fmt: skip

FEATURES: Mapping[str, tuple[str, str]] = {
    r"(num|n)_(local_|routed_|shared_)?experts?|(use_)?(moe|tutel)(_.*)?|experts?(_.*)?|ep(_size)?|top_?k|router_.*|"
    r".*aux_loss.*|capacity_factor|first_k_dense_replace": ("a mixture of experts", "every block has one dense MLP"),
    r"(ring|usp|ulysses)(_.*)?|context_(?!length).*|cp(_size|_degree)?|sequence_2d|.*_(ring|ulysses)(_.*)?|(uly|ring)_sp|"
    r"ds_sequence_parallel.*": (
        "context parallelism by another name",
        "here it is parallel.context=dict(size=k, exchange='gather'), or 'ring', or 'ulysses'"),
    r"weight_parallel.*|isp(_.*)?": (
        "weight parallelism (isp)", "parallel.zero_stage=3 spreads weights and gathers them block by block, too"),
    r"(use_)?(fsdp|hsdp)\d?(_.*)?|zero_?3.*|zero_optimization|dp_shard.*|data_parallel_shard_degree": (
        "sharding of weights by another name",
        "here it is parallel.zero_stage=3, or 2 for gradients alone"),
    r"\w+_offload(ing)?(_.*)?|offload(ing|_(optim|param|activ|device|weight|grad|model|state|dir|to_)\w*)": (
        "offloading to host memory under this name",
        "model.checkpoint='offload' moves activations, engine=dict(name='deepspeed', offload='cpu') optimizer state"),
    r"(q_|kv_)lora_rank|(use_)?mla|qk_(nope|rope)_head_dim|v_head_dim|multi_latent_attention": (
        "multi-head latent attention", "model.num_kv_attention_heads gives grouped-query attention"),
    r"(use_)?(q|do)?lora(_.*)?|(use_)?peft(_.*)?|(.*_)?adapters?(_.*)?": (
        "LoRA and other adapters", "all weights are trained"),
    r"(use_|enable_|do_)?(dpo|rlhf|ppo|grpo|kto|orpo|rloo|reward|rl)(_.*)?|is_reward|ref_model|beta_dpo": (
        "training on preferences or rewards (DPO, PPO, reward models)", "the loss is next-token cross-entropy"),
    r".+fp8.*|fp8.+|.*float8.*|.*mxfp.*|transformer_engine.*": (
        "another form of FP8", "model.fp8=True is for the products of the blocks"),
    r"(load_in_)?[48]_?bit.*|quant.*|.*(gptq|awq|bnb|bitsandbytes).*": ("quantised training", "see model.dtype"),
    r"mm_.*|(use_)?(image|images|vision|vit|video|audio)(_.*)?|multi_?modal.*|projector.*": (
        "images, video and sound", "the model reads tokens of text"),
    r".*cuda_?graphs?.*|compile_.*|.*inductor.*": ("CUDA graphs and options of the compiler", "see model.compile"),
    r"drop_?path.*|(use_)?layer_?drop.*|stochastic_depth.*": (
        "dropout of whole layers", "model.residual_dropout drops features"),
    r"local_attention.*|attention_sinks?|sink_.*": (
        "another form of local attention", "model.sliding_window and model.layer_types set windows"),
    r"(use_)?(yarn|ntk|alibi)(_.*)?": (
        "other position embeddings", "model.position names the kind, model.rope_scaling scales rotary frequencies"),
    r"(use_)?parallel_(residual|attn|attention|block).*": (
        "attention and feed-forward part side by side", "a block runs one after the other"),
    r"mtp(_.*)?|num_nextn_predict_layers|multi_token.*": ("multi-token prediction", "one token is predicted"),
    r"early_stopping.*|load_best_model.*|metric_for_best.*": (
        "stopping by a metric", "ckpt.keep_best keeps what was best, ckpt.stop_file_path stops"),
    r"hf|hf_model|huggingface.*|trust_remote_code|attn_implementation": (
        "models of transformers", "`internlm-lite convert from-hf` reads weights of 15 families, from GPT-2 to Qwen3"),
    r"deepspeed.*|ds_config": (
        "DeepSpeed's own settings", "engine = dict(name=\"deepspeed\", stage=3, offload=\"cpu\") runs its ZeRO"),
    r"megatron.*|accelerate.*|auto_parallel.*|trainer_type": (
        "another framework's settings", "write the keys of docs/config.md"),
    r"hooks?|default_hooks|custom_hooks|train_cfg|val_cfg|test_cfg|optim_wrapper|param_scheduler": (
        "settings of mmengine", "write the keys of docs/config.md"),
    r"subset_params|attributes|fim_.*|online_prompt|compute_subset_loss|.*_func_str|custom_scheduler": (
        "a feature of one site's own version", "it has no meaning in the public ones"),
}  # fmt: skip
_COMPILED = [(re.compile(pattern, re.IGNORECASE), *row) for pattern, row in FEATURES.items()]

_OTHER_NAMES = {
    "adam.adam_beta1": "beta1 adam_beta_1",
    "adam.adam_beta2": "beta2 adam_beta_2",
    "adam.adam_eps": "eps epsilon adam_epsilon",
    "adam.lr": "learning_rate max_lr peak_lr",
    "ckpt.checkpoint_every": "save_steps save_interval checkpoint_interval save_freq",
    "ckpt.load_ckpt_folder": "resume_from_checkpoint load resume_from",
    "ckpt.load_model_only_folder": "model_name_or_path pretrained pretrained_model_name_or_path init_from load_from",
    "ckpt.save_ckpt_folder": "output_dir save save_dir work_dir checkpoints_path dump_folder",
    "data.micro_bsz": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu local_batch_size",
    "data.micro_num": "gradient_accumulation_steps batch_accumulation_per_replica num_microbatches global_batch_size "
    "train_batch_size",
    "data.seq_len": "seq_length max_seq_len max_seq_length max_length sequence_length model_max_length block_size "
    "context_length",
    "data.tokenizer": "vocab_file tokenizer_model tokenizer_name_or_path",
    "data.epochs": "epoch num_epochs train_epochs num_train_epochs",
    "data.total_steps": "max_steps train_iters train_steps max_iters total_iters training_steps",
    "data.train_folder": "data_path dataset dataset_path train_data_path train_file",
    "data.valid_at_start": "eval_on_start",
    "data.valid_batches": "eval_iters",
    "data.valid_every": "eval_steps eval_interval",
    "data.weights": "dataset_weights data_weights blend",
    "ema.decay": "ema_decay use_ema ema_rate",
    "hybrid_zero_optimizer.clip_grad_norm": "max_grad_norm gradient_clipping clip_grad max_norm",
    "loss.z_loss": "z_loss_weight z_loss_multiplier z_loss_coefficient z_loss_coeff",
    "lr_scheduler.decay_steps": "lr_wsd_decay_iters wsd_decay_steps num_decay_steps",
    "lr_scheduler.kind": "lr_scheduler_type lr_decay_style",
    "lr_scheduler.eta_min": "min_lr min_decay_lr lr_min",
    "lr_scheduler.warmup_steps": "lr_warmup_iters lr_warmup_steps warmup_iters num_warmup_steps",
    "model.attention_scale": "softmax_scale attention_multiplier query_pre_attn_scalar",
    "model.attention_dropout": "attn_drop_rate attn_pdrop attn_dropout attention_probs_dropout_prob",
    "model.residual_dropout": "drop_rate resid_pdrop hidden_dropout hidden_dropout_prob resid_dropout dropout",
    "model.embedding_dropout": "embed_dropout embd_pdrop embd_dropout",
    "model.attention_softcap": "attn_logit_softcapping attn_logit_softcap attention_logit_cap",
    "model.checkpoint": "gradient_checkpointing activation_checkpoint activation_checkpointing recompute "
    "recompute_granularity",
    "model.compile": "torch_compile use_torch_compile use_compile enable_compile",
    "model.dtype": "bf16 fp16 torch_dtype precision mixed_precision params_dtype",
    "model.embed_scale": "embedding_multiplier embedding_scale",
    "model.head_bias": "lm_head_bias output_bias",
    "model.head_dim": "kv_channels",
    "model.hidden_size": "n_embd d_model emb_dim embedding_dim dim",
    "model.init_std": "initializer_range init_method_std",
    "model.layer_norm_epsilon": "rms_norm_eps norm_eps norm_epsilon layernorm_epsilon",
    "model.layer_types": "sliding_window_pattern max_window_layers",
    "model.logit_scale": "logits_scale logit_multiplier lm_head_multiplier",
    "model.logit_softcap": "final_logit_softcapping final_logit_softcap final_logits_soft_cap logits_soft_cap",
    "model.mlp_bias": "ffn_bias",
    "model.mlp_ratio": "intermediate_size ffn_hidden_size ffn_dim",
    "model.mlp_type": "hidden_act hidden_activation activation_function activation_func ffn_act_type swiglu",
    "model.max_position_embeddings": "n_positions n_ctx max_seq_len max_sequence_length",
    "model.no_rope_every": "no_rope_layer_interval nope_layer_interval no_rope_freq",
    "model.num_attention_heads": "n_head n_heads num_heads",
    "model.num_kv_attention_heads": "num_key_value_heads num_query_groups n_kv_heads",
    "model.norm_type": "normalization",
    "model.num_layers": "num_hidden_layers n_layers n_layer",
    "model.partial_rotary_factor": "rotary_pct rotary_percent",
    "model.position": "position_embedding_type",
    "model.qk_norm": "qk_layernorm use_qk_norm",
    "model.rope_base": "rope_theta rotary_base",
    "model.rope_local_base": "rope_local_base_freq rope_local_theta",
    "model.sliding_window": "use_sliding_window window_size attention_window sliding_window_size",
    "model.tie_word_embeddings": "tie_embeddings_and_output_weights share_embeddings_and_output_weights",
    "model.zero_centered_norm": "layernorm_zero_centered_gamma apply_layernorm_1p",
    "monitor.log_every": "logging_steps log_interval log_freq iteration_step_info_interval",
    "monitor.wandb": "report_to",
    "parallel.pipeline.size": "pipeline_model_parallel_size pp_size pp pipeline_parallel_degree",
    "parallel.tensor": "tensor_model_parallel_size tp_size tp tensor_parallel_degree",
    "parallel.zero1": "use_distributed_optimizer zero1_size data_parallel_replicate_degree dp_replicate",
    "parallel.zero_stage": "zero zero_level data_parallel_sharding_strategy sharding_strategy",
}
OTHER_NAMES: Mapping[str, str] = {name: key for key, names in _OTHER_NAMES.items() for name in names.split()}


def missing_feature(name: str) -> str | None:
    """That a feature does not exist here, or has another name, and what comes nearest, if a key called `name` asks for
    one."""
    row = next((row for row in _COMPILED if row[0].fullmatch(name)), None)
    if row is None:
        return None
    missing = "" if " name" in row[1] else ", which is not supported"
    return f"this asks for {row[1]}{missing}; {row[2]}"


def asks_for_nothing(value: Any) -> bool:
    """Whether the value of a key of a feature leaves the feature off: None, False, "", "none", a size up to 1."""
    if isinstance(value, dict):
        switches = ("enable", "enabled", "size", "use_sliding_window")
        switch = [value[name] for name in switches if name in value]
        return asks_for_nothing(switch[0]) if switch else not value
    if isinstance(value, str):
        return value.lower() in ("", "none", "no", "off", "false", "disable", "disabled")
    small = isinstance(value, int) and value is not True and value <= 1
    return value is None or small or value in (0.0, (), [])
