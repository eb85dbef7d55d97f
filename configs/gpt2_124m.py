"""GPT-2 of 124 M parameters from nothing on one text: its first 90 % to train on, the rest for validation, in windows
of 256 tokens that do not overlap; 10 epochs, evaluated every 5 steps, with a sample of text after each epoch.

12 layers of width 768, 12 heads, LayerNorm, GELU, learned positions, dropout of 0.1, embedding and head apart:

    python train.py --config configs/gpt2_124m.py --dry-run --components FOLDER=None     162,419,712 parameters
    ... SEQ_LEN=1024                                                                     163,009,536
    ... SEQ_LEN=1024 TIED=True                                                           124,412,160
    ... SEQ_LEN=1024 TIED=True QKV_BIAS=True, as published                               124,439,808

Data: a folder `story` with one .txt, and GPT-2's tokenizer, a folder `gpt2` with its vocab.json and merges.txt:

    python tools/tokenizer.py encode --input story --output jobs/gpt2_124m/tokens/train --tokenizer gpt2 \\
        --split-at 90% --without-bos-eos

The loss of untrained weights, near ln(50,257) = 10.8; train; evaluate the last checkpoint alone; continue a prompt;
curves of loss and perplexity over epochs and tokens:

    python train.py --config configs/gpt2_124m.py --eval-only --resume none
    python train.py --config configs/gpt2_124m.py
    python train.py --config configs/gpt2_124m.py --eval-only
    python tools/generate.py --checkpoint jobs/gpt2_124m/ckpts --prompt "Every effort moves you" --max-new-tokens 50
    python tools/report.py RUN/gpt2_124m/latest --over epoch

configs/gpt2_124m_tiny.py is the same job on this checkout's README, in a minute on a laptop.
"""

import glob
import json
from pathlib import Path

JOB_NAME = "gpt2_124m"
FOLDER = "jobs/gpt2_124m"  # tokens/{train,valid}; ckpts. None: the built-in dummy data, and nothing is kept
TOKENIZER = "gpt2"

VOCAB_SIZE = 50257
SEQ_LEN = 256  # 1024: as published
HIDDEN_SIZE = 768
NUM_LAYER = 12
NUM_HEAD = 12
TIED = False
QKV_BIAS = False
DROPOUT = 0.1

EPOCHS = 10
LEARNING_RATE = 4e-4
MICRO_BSZ = 2
MICRO_NUM = 1
EVAL_EVERY = 5
EVAL_BATCHES = 5
PROMPT = "Every effort moves you"


def _corpus_size():
    """Training tokens; those of a short story if there are no data yet."""
    paths = glob.glob(f"{FOLDER}/tokens/train/*/*.meta.json")
    return sum(json.loads(Path(path).read_text())["tokens"] for path in paths) or 4608


STEPS = EPOCHS * max(1, _corpus_size() // (MICRO_NUM * MICRO_BSZ * SEQ_LEN))

seed = 123

ckpt = dict(
    enable_save_ckpt=bool(FOLDER),
    save_ckpt_folder=FOLDER and f"local:{FOLDER}/ckpts",
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=MICRO_BSZ,
    micro_num=MICRO_NUM,
    total_steps=STEPS,
    train_folder=FOLDER and f"{FOLDER}/tokens/train",
    valid_folder=FOLDER and f"{FOLDER}/tokens/valid",
    valid_at_start=True,
    valid_every=EVAL_EVERY,
    valid_batches=EVAL_BATCHES,
    valid_train_batches=EVAL_BATCHES,
    tokenizer=FOLDER and TOKENIZER,
)

model = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    num_attention_heads=NUM_HEAD,
    norm_type="layernorm",
    layer_norm_epsilon=1e-5,
    mlp_type="gelu_tanh",
    mlp_ratio=4,
    mlp_bias=True,
    qkv_bias=QKV_BIAS,
    out_bias=True,
    position="learned",
    max_position_embeddings=SEQ_LEN,
    embedding_dropout=DROPOUT,
    attention_dropout=DROPOUT,
    residual_dropout=DROPOUT,
    tie_word_embeddings=TIED,
    init_std=0.02,
    dtype="torch.float32",
    compile=False,
)

hybrid_zero_optimizer = dict(clip_grad_norm=0)

adam = dict(
    lr=LEARNING_RATE,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_eps=1e-8,
    weight_decay=0.1,
    weight_decay_on="all",
)

lr_scheduler = dict(total_steps=STEPS, warmup_steps=0, kind="constant")

beta2_scheduler = dict(init_beta2=adam["adam_beta2"])

parallel = dict(zero1=-1, tensor=1)

monitor = dict(
    log_every=1,
    sample_prompts=[PROMPT] if FOLDER else [],
    sample_every="epoch" if FOLDER else 0,
    sample_tokens=50,
)
