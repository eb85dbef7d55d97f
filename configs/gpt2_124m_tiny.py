"""The job of configs/gpt2_124m.py in a minute on two cores: 2 layers of width 64, on the README of this checkout.

    mkdir -p jobs/gpt2_124m_tiny/text && cp README.md jobs/gpt2_124m_tiny/text/
    python tools/tokenizer.py train  --input jobs/gpt2_124m_tiny/text --vocab-size 512 \\
        --output jobs/gpt2_124m_tiny/tokenizer.model
    python tools/tokenizer.py encode --input jobs/gpt2_124m_tiny/text --output jobs/gpt2_124m_tiny/tokens/train \\
        --split-at 90% --without-bos-eos --tokenizer jobs/gpt2_124m_tiny/tokenizer.model
    python train.py --config configs/gpt2_124m_tiny.py
    python train.py --config configs/gpt2_124m_tiny.py --eval-only
    python tools/generate.py --checkpoint jobs/gpt2_124m_tiny/ckpts --prompt "The model" --max-new-tokens 50
    python tools/report.py RUN/gpt2_124m_tiny/latest --over epoch
"""

JOB_NAME = "gpt2_124m_tiny"
FOLDER = "jobs/gpt2_124m_tiny"
TOKENIZER = f"{FOLDER}/tokenizer.model"

VOCAB_SIZE = 512
SEQ_LEN = 64
HIDDEN_SIZE = 64
NUM_LAYER = 2
NUM_HEAD = 4

LEARNING_RATE = 3e-3
EVAL_EVERY = 50
PROMPT = "The model"

_base_ = "gpt2_124m.py"
