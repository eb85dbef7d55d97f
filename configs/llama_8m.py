"""A Llama of 8 M parameters for short stories, as small single-file projects train it on one GPU: 100,000 steps of
4 micro-batches of 8 windows of 256 tokens, evaluated on training and validation data from the first step on.

8 layers of width 288, 8 query heads over 4 key/value heads, SwiGLU of 768, a vocabulary of 4,096, embedding and head
shared: 8,483,616 parameters, 57,979,584 FLOPs a token.

Data, from a folder of stories (.jsonl, .txt, ...); then what it will cost, before anything is started:

    python tools/tokenizer.py train  --input stories --output jobs/llama_8m/tokenizer.model --vocab-size 4096
    python tools/tokenizer.py encode --input stories --output jobs/llama_8m/tokens/train --holdout 1% \\
        --tokenizer jobs/llama_8m/tokenizer.model
    python train.py --config configs/llama_8m.py --dry-run --components    # FOLDER=None: before there are data

Train; evaluate what was kept, alone; continue a prompt from it; curves as a page and a picture:

    python train.py --config configs/llama_8m.py
    python train.py --config configs/llama_8m.py --eval-only
    python tools/generate.py --checkpoint jobs/llama_8m/ckpts --prompt "Once upon a time" --temperature 0.8
    python tools/report.py RUN/llama_8m/latest

configs/llama_8m_tiny.py is the same job on this checkout's own sources, in a minute on a laptop.
"""

JOB_NAME = "llama_8m"
FOLDER = "jobs/llama_8m"  # tokenizer.model, tokens/{train,valid}; ckpts. None: dummy data, and nothing is kept

VOCAB_SIZE = 4096
SEQ_LEN = 256
HIDDEN_SIZE = 288
NUM_LAYER = 8
NUM_HEAD = 8
NUM_KV_HEAD = 4
MULTIPLE_OF = 32  # feed-forward width: 8/3 of HIDDEN_SIZE, rounded up
DTYPE = "torch.bfloat16"

STEPS = 100000
WARMUP_STEPS = 1000
LEARNING_RATE = 5e-4
MICRO_BSZ = 8
MICRO_NUM = 4  # gradient accumulation
EVAL_EVERY = 2000
EVAL_BATCHES = 100  # of one micro-batch, of training and of validation data each
PROMPT = "Once upon a time"

seed = 1337

ckpt = dict(
    enable_save_ckpt=bool(FOLDER),
    save_ckpt_folder=FOLDER and f"local:{FOLDER}/ckpts",
    keep_best=bool(FOLDER),  # after every evaluation that is better than all before
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=MICRO_BSZ,
    micro_num=MICRO_NUM,
    total_steps=STEPS,
    pack_sample_into_one=True,  # stories end to end, cut into windows of SEQ_LEN
    train_folder=FOLDER and f"{FOLDER}/tokens/train",
    valid_folder=FOLDER and f"{FOLDER}/tokens/valid",
    valid_at_start=True,
    valid_every=EVAL_EVERY,
    valid_micro_num=1,
    valid_batches=EVAL_BATCHES,
    valid_train_batches=EVAL_BATCHES,
    tokenizer=FOLDER and f"{FOLDER}/tokenizer.model",
)

model = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    num_attention_heads=NUM_HEAD,
    num_kv_attention_heads=NUM_KV_HEAD,
    mlp_ratio=8 / 3,
    multiple_of=MULTIPLE_OF,
    no_bias=True,
    tie_word_embeddings=True,
    init_std=0.02,
    layer_norm_epsilon=1e-5,
    dtype=DTYPE,
)

hybrid_zero_optimizer = dict(clip_grad_norm=1.0)

adam = dict(
    lr=LEARNING_RATE,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_eps=1e-8,
    weight_decay=0.1,
    weight_decay_on="matrices",  # 8,478,720 parameters; 4,896 weights of norms are left alone
)

lr_scheduler = dict(
    total_steps=STEPS,
    warmup_steps=WARMUP_STEPS,
    warmup_from_zero=True,  # t / WARMUP_STEPS in step t, which counts from 0
    eta_min=0.0,
)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"])

parallel = dict(zero1=-1, tensor=1)

monitor = dict(
    log_every=1,
    sample_prompts=[PROMPT] if FOLDER else [],
    sample_every=EVAL_EVERY if FOLDER else 0,
    sample_tokens=64,
)
