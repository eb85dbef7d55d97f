"""The job of configs/translate_de_en.py in minutes on two cores: 2 + 2 layers of width 128, on the same text, in 2,000
pieces of sentencepiece that both languages share.

    python tools/pair_corpus.py --output jobs/translate_de_en_tiny/text
    python tools/tokenizer.py train --input jobs/translate_de_en_tiny/text/train/* --side de en --vocab-size 2000 \\
        --output jobs/translate_de_en_tiny/pieces.model
    python tools/tokenizer.py encode --input jobs/translate_de_en_tiny/text/train/* --pair de en \\
        --output jobs/translate_de_en_tiny/tokens/train --tokenizer jobs/translate_de_en_tiny/pieces.model
    python tools/tokenizer.py encode --input jobs/translate_de_en_tiny/text/valid/* --pair de en \\
        --output jobs/translate_de_en_tiny/tokens/valid --tokenizer jobs/translate_de_en_tiny/pieces.model
    python train.py --config configs/translate_de_en_tiny.py
"""

JOB_NAME = "translate_de_en_tiny"
FOLDER = "jobs/translate_de_en_tiny"
SOURCE_TOKENIZER = TOKENIZER = "pieces.model"

SOURCE_VOCAB_SIZE = VOCAB_SIZE = 2000
HIDDEN_SIZE = 128
FEED_FORWARD = 512
NUM_LAYER = 2
NUM_HEAD = 4
ATTENTION_DROPOUT = 0.0  # takes as long as all the rest

MAX_PADDING = 48
MICRO_NUM = 1
EPOCHS = 0.6  # 1,018 steps; the validation loss falls from 7.6 to 4.2 in the first 339 of them
EVAL_EVERY = 250
WARMUP = 150

_base_ = "translate_de_en.py"
