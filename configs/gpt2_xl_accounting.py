"""What a decoder of GPT-2 XL's shape holds and computes, in fp32 with AdamW: an account, before anything is started.

48 layers of width 1,600 with 25 heads, RMSNorm, rotary positions, no biases, embedding and head apart.

    python train.py --config configs/gpt2_xl_accounting.py --dry-run --lengths 16384 --memory 80GB --tflops 9.75

says, with two feed-forward matrices of width 6,400, so 12 d^2 elements in the matrices of a layer:

    parameters    1,635,382,400 in matrices, which decay, and 155,200 weights of norms
    memory        16 bytes each: weight, gradient, two moments; activations, component by component; and the largest
                  data.micro_bsz for 80 GB (attention keeps no matrix of probabilities, as a plain softmax does)
    FLOPs         3.5067e12 of a forward pass over 1,024 tokens, and how the components' shares change over 16,384
    the update    14 operations a parameter
    time          of 400,000 steps with 1,024 rows, at half of the 19.5 TFLOP/s that an A100 has in fp32

MLP_TYPE=swiglu adds the gate, of the same width, so 16 d^2: 2,126,902,400 and 4.5133e12. OPTIMIZER=sgd has no moments,
and its learning rate falls as 1 / sqrt(t + 1).

configs/gpt2_xl_tiny.py trains the same parts in seconds.
"""

JOB_NAME = "gpt2_xl_accounting"

VOCAB_SIZE = 50257
SEQ_LEN = 1024
HIDDEN_SIZE = 1600
NUM_LAYER = 48
NUM_HEAD = 25
MLP_TYPE = "gelu"
OPTIMIZER = "adamw"

STEPS = 400000
WARMUP_STEPS = 4000
LEARNING_RATE = 3e-4
BATCH_SIZE = 1024  # rows of SEQ_LEN tokens in a step
MICRO_BSZ = 1

ckpt = dict(enable_save_ckpt=False)

data = dict(  # the built-in dummy data
    seq_len=SEQ_LEN,
    micro_bsz=MICRO_BSZ,
    micro_num=BATCH_SIZE // MICRO_BSZ,
    total_steps=STEPS,
)

model = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    num_attention_heads=NUM_HEAD,
    mlp_type=MLP_TYPE,
    mlp_ratio=4,
    multiple_of=64,
    no_bias=True,
    layer_norm_epsilon=1e-5,
    dtype="torch.float32",
)

hybrid_zero_optimizer = dict(clip_grad_norm=1.0)

optimizer = dict(name=OPTIMIZER)

adam = dict(lr=LEARNING_RATE, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1)

lr_scheduler = dict(
    total_steps=STEPS,
    warmup_steps=0
    if OPTIMIZER == "sgd"
    else WARMUP_STEPS,  # without: LEARNING_RATE / sqrt(t + 1) from the first step on
    warmup_from_zero=True,
    kind="inverse_sqrt" if OPTIMIZER == "sgd" else "cosine",
    eta_min=LEARNING_RATE / 10,
)

parallel = dict(zero1=-1, tensor=1)
