"""The copy task of the annotated transformer: an encoder-decoder learns to repeat 10 symbols, of which the first is 1,
in 200 steps of 80 sequences. The data are built in, so there is nothing to prepare:

    python train.py --config configs/copy_task.py

2 + 2 layers of a width that takes less than a minute on two cores; HIDDEN_SIZE=512 is the width of the original.
"""

JOB_NAME = "copy_task"
FOLDER = "jobs/copy_task"  # ckpts. None: nothing is kept

VOCAB_SIZE = 11  # symbols 1 to 10; 0 is never used
LENGTH = 10
BATCH = 80
HIDDEN_SIZE = 128
NUM_LAYER = 2
NUM_HEAD = 8
DROPOUT = 0.0
DTYPE = "torch.float32"

STEPS = 200  # the original has 400
EVAL_EVERY = 50
BASE_LR = 0.5
WARMUP = 200

seed = 1234

ckpt = dict(enable_save_ckpt=bool(FOLDER), save_ckpt_folder=FOLDER and f"local:{FOLDER}/ckpts")

data = dict(
    seq_len=LENGTH - 1,  # a decoder reads all but the last symbol
    source_seq_len=LENGTH,
    row_pairs=BATCH,
    micro_bsz=BATCH,
    total_steps=STEPS,
    train_folder=None,
    valid_every=EVAL_EVERY,
    valid_batches=2,
)

model = dict(
    num_encoder_layers=NUM_LAYER,
    num_layers=NUM_LAYER,
    source_vocab_size=VOCAB_SIZE,
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_attention_heads=NUM_HEAD,
    mlp_ratio=4,
    multiple_of=1,
    mlp_type="relu",
    mlp_bias=True,
    head_bias=True,
    norm_type="sample_layernorm",
    layer_norm_epsilon=1e-6,
    position="sinusoidal",
    embed_scale=HIDDEN_SIZE**0.5,
    embedding_dropout=DROPOUT,
    residual_dropout=DROPOUT,
    attention_dropout=DROPOUT,
    dtype=DTYPE,
    compile=False,
)

hybrid_zero_optimizer = dict(clip_grad_norm=0)

adam = dict(lr=BASE_LR, adam_beta1=0.9, adam_beta2=0.98, adam_eps=1e-9, weight_decay=0)

lr_scheduler = dict(kind="noam", warmup_steps=WARMUP)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"])

parallel = dict(zero1=-1, tensor=1)

monitor = dict(log_every=20)
