"""The parts of configs/gpt2_xl_accounting.py in a model of 2 layers of width 64: seconds on two cores, dummy data.

python train.py --config configs/gpt2_xl_tiny.py
python train.py --config configs/gpt2_xl_tiny.py OPTIMIZER=sgd LEARNING_RATE=0.5
python train.py --config configs/gpt2_xl_tiny.py --dry-run --components
python tools/report.py RUN/gpt2_xl_tiny/latest
"""

JOB_NAME = "gpt2_xl_tiny"

VOCAB_SIZE = 512  # the dummy data use ids below 200
SEQ_LEN = 64
HIDDEN_SIZE = 64
NUM_LAYER = 2
NUM_HEAD = 4

STEPS = 60
WARMUP_STEPS = 6
LEARNING_RATE = 4e-3
BATCH_SIZE = 16
MICRO_BSZ = 4

_base_ = "gpt2_xl_accounting.py"

model = dict(compile=False)
