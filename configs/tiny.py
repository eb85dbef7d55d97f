"""A model small enough for any CPU, on the built-in dummy data: starts in seconds, needs no files.

python train.py --config configs/tiny.py
"""

JOB_NAME = "tiny"

SEQ_LEN = 128
VOCAB_SIZE = 512  # the dummy data use ids below 200
TOTAL_STEPS = 20

ckpt = dict(enable_save_ckpt=False)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=2,
    micro_bsz=2,
    total_steps=TOTAL_STEPS,
)

hybrid_zero_optimizer = dict(
    reduce_bucket_size=64 * 1024,  # several buckets even in a model of this size
)

adam = dict(lr=1e-3)

lr_scheduler = dict(
    total_steps=TOTAL_STEPS,
    warmup_ratio=0.1,
    eta_min=1e-4,
)

model = dict(
    num_attention_heads=4,
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    num_layers=2,
    multiple_of=32,  # SwiGLU width 192
    dtype="torch.float32",
    compile=False,  # on a GPU compiling would take longer than the run
)

parallel = dict(zero1=-1, tensor=1)
