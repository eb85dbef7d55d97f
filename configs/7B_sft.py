"""The 7B model of InternLM on one node of 8 GPUs: 32 layers of width 4096, data parallel only.

torchrun --nproc_per_node=8 train.py --config configs/7B_sft.py
"""

JOB_NAME = "7b_train"

SEQ_LEN = 2048
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3  # SwiGLU width 11008
NUM_LAYER = 32
VOCAB_SIZE = 103168

# A folder is "local:PATH" or a plain path. On S3, with the endpoint from the environment:
#     import os
#     BOTO3_IP = os.environ["BOTO3_IP"]
#     SAVE_CKPT_FOLDER = f"boto3:s3://model_weights.{BOTO3_IP}/internlm"
MODEL_ONLY_FOLDER = "local:llm_ckpts/xxxx"
SAVE_CKPT_FOLDER = "local:llm_ckpts"
LOAD_CKPT_FOLDER = "local:llm_ckpts/49"
CHECKPOINT_EVERY = 50
ckpt = dict(
    enable_save_ckpt=False,  # set to True to keep what is trained
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    # load_ckpt_folder=LOAD_CKPT_FOLDER,  # go on from here: weights, optimizer, data position
    # load_model_only_folder=MODEL_ONLY_FOLDER,  # or start at step 0 from these weights
    load_optimizer=True,
    checkpoint_every=CHECKPOINT_EVERY,
    async_upload=True,  # the step does not wait for the upload
    async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/",
    snapshot_ckpt_folder="/".join([SAVE_CKPT_FOLDER, "snapshot"]),  # rotating checkpoints between the kept ones
    oss_snapshot_freq=int(CHECKPOINT_EVERY / 2),
)

TRAIN_FOLDER = "/path/to/dataset"  # one sub-folder for each kind of data
VALID_FOLDER = "/path/to/dataset"
data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,  # micro-batches summed into one update
    micro_bsz=2,  # a micro-batch is one packed row of micro_bsz * SEQ_LEN tokens
    valid_micro_num=4,
    valid_every=50,  # 0: never
    pack_sample_into_one=False,  # attention stays inside each document
    total_steps=50000,
    skip_batches="",  # "1-3,7" drops batches 1, 2, 3 and 7
    rampup_batch_size="",  # "1 1 100" starts with one micro-batch and adds one every 100 steps
    min_length=50,  # documents with fewer tokens are dropped
    # train_folder=TRAIN_FOLDER,  # without these two: the built-in dummy data
    # valid_folder=VALID_FOLDER,
)

grad_scaler = dict(  # used with torch.float16 only
    fp16=dict(
        initial_scale=2**16,
        min_scale=1,
        growth_interval=1000,  # steps without overflow before the scale grows
    ),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,  # overflows before the scale shrinks
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,  # reduce gradients while the backward pass runs
    overlap_sync_param=True,  # gather weights while the next forward pass starts
    reduce_bucket_size=512 * 1024 * 1024,  # elements
    clip_grad_norm=1.0,
)

loss = dict(
    label_smoothing=0,
)

adam = dict(
    lr=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_beta2_c=0,
    adam_eps=1e-8,
    weight_decay=0.01,
)

lr_scheduler = dict(
    total_steps=data["total_steps"],
    init_steps=0,
    warmup_ratio=0.01,
    eta_min=1e-5,
    last_epoch=-1,
)

beta2_scheduler = dict(
    init_beta2=adam["adam_beta2"],
    c=adam["adam_beta2_c"],
    cur_iter=-1,
)

model = dict(
    checkpoint=False,  # True, or a share of the layers: recompute activations to save memory
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False,
    dtype="torch.bfloat16",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,  # stages per pipeline rank; more than one: interleaved
)

parallel = dict(
    zero1=8,  # optimizer state spread over the 8 GPUs of a node; more nodes hold copies of it
    tensor=1,
    pipeline=dict(size=1, interleaved_overlap=True),
    sequence_parallel=False,
)

cudnn_deterministic = False
cudnn_benchmark = False
