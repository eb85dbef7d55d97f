"""The job of configs/llama_8m.py in a minute on two cores: 131,392 parameters, on the sources of this checkout.

    python tools/tokenizer.py train  --input internlm_lite --output jobs/llama_8m_tiny/tokenizer.model --vocab-size 512
    python tools/tokenizer.py encode --input internlm_lite --output jobs/llama_8m_tiny/tokens/train --holdout 10% \\
        --tokenizer jobs/llama_8m_tiny/tokenizer.model
    python train.py --config configs/llama_8m_tiny.py
    python train.py --config configs/llama_8m_tiny.py --eval-only
    python tools/generate.py --checkpoint jobs/llama_8m_tiny/ckpts --prompt "def " --temperature 0.8
    python tools/report.py RUN/llama_8m_tiny/latest
"""

JOB_NAME = "llama_8m_tiny"
FOLDER = "jobs/llama_8m_tiny"

VOCAB_SIZE = 512
SEQ_LEN = 64
HIDDEN_SIZE = 64
NUM_LAYER = 2
DTYPE = "torch.float32"

STEPS = 200
WARMUP_STEPS = 20
LEARNING_RATE = 4e-3
EVAL_EVERY = 50
EVAL_BATCHES = 8
PROMPT = "def "

_base_ = "llama_8m.py"

model = dict(init_std=0.06, compile=False)
