"""German to English with an encoder and a decoder, as the annotated transformer (arXiv:1706.03762, base) is trained on
some 30,000 pairs of sentences: 8 epochs, evaluated and saved after each of them.

6 + 6 layers of width 512, feed-forward of 2,048, 8 heads, sinusoidal positions, vocabularies of 8,316 German and 6,384
English words, a head of its own: 54,941,936 parameters:

    python train.py --config configs/translate_de_en.py --dry-run --components FOLDER=None

Data: pairs of sentences, line by line: folders text/{train,valid,test}/NAME with files x.de and x.en. Here from manuals
that Debian has in both languages, as words; their lists are made from the text to train on alone. With spaCy installed
its rules cut the words:

    python tools/pair_corpus.py --output jobs/translate_de_en/text
    cd jobs/translate_de_en
    python ../../tools/tokenizer.py train --input text/train/* --side de --words --min-freq 2 --vocab-size 8316 \\
        --output de.json
    python ../../tools/tokenizer.py train --input text/train/* --side en --words --min-freq 2 --vocab-size 6384 \\
        --output en.json
    for part in train valid test; do python ../../tools/tokenizer.py encode --input text/$part/* --pair de en \\
        --source-tokenizer de.json --tokenizer en.json --output tokens/$part; done
    cd ../..

Train:

    python train.py --config configs/translate_de_en.py

A micro-batch is 32 pairs and an update 10 of them. The learning rate is that of the micro-batch with which an update
ends, counted from 1: a rate of 1 and a warm-up of 3,000 micro-batches are the same as a rate of 10^-0.5 and a warm-up
of 300 updates. LR_PER=update counts updates instead. configs/translate_de_en_tiny.py is the same job on a laptop.
"""

JOB_NAME = "translate_de_en"
FOLDER = "jobs/translate_de_en"  # {de,en}.json, tokens/{train,valid}; ckpts. None: the copy task, and nothing is kept
SOURCE_TOKENIZER, TOKENIZER = "de.json", "en.json"

SOURCE_VOCAB_SIZE = 8316
VOCAB_SIZE = 6384
HIDDEN_SIZE = 512
FEED_FORWARD = 2048
NUM_LAYER = 6  # of the encoder, and of the decoder
NUM_HEAD = 8
DROPOUT = 0.1
ATTENTION_DROPOUT = DROPOUT
SMOOTHING = 0.1
NORM_TYPE = "sample_layernorm"
DTYPE = "torch.float32"

MAX_PADDING = 72  # tokens of a sentence with its marks; longer ones are cut before their end mark
PAIRS = 32
MICRO_BSZ = 12  # longest sentences that a row has room for; PAIRS: room for any, and more filling
MICRO_NUM = 10  # gradient accumulation

EPOCHS = 8
EVAL_EVERY = "epoch"
BASE_LR = 1.0
WARMUP = 3000
LR_PER = "micro_batch"
_STEPS_OF_AN_UPDATE = MICRO_NUM if LR_PER == "micro_batch" else 1

seed = 1234

ckpt = dict(
    enable_save_ckpt=bool(FOLDER),
    save_ckpt_folder=FOLDER and f"local:{FOLDER}/ckpts",
    checkpoint_every="epoch",
)

data = dict(
    seq_len=MAX_PADDING - 1,  # a decoder reads all but the last token
    source_seq_len=MAX_PADDING,
    truncate_pairs=True,
    row_pairs=PAIRS,
    micro_bsz=MICRO_BSZ,
    micro_num=MICRO_NUM,
    epochs=EPOCHS,
    train_folder=FOLDER and f"{FOLDER}/tokens/train",
    valid_folder=FOLDER and f"{FOLDER}/tokens/valid",
    valid_every=EVAL_EVERY,
    valid_at_start=True,
    valid_micro_num=1,
    valid_batches=1000,
    source_tokenizer=FOLDER and f"{FOLDER}/{SOURCE_TOKENIZER}",
    tokenizer=FOLDER and f"{FOLDER}/{TOKENIZER}",
)

model = dict(
    num_encoder_layers=NUM_LAYER,
    num_layers=NUM_LAYER,
    source_vocab_size=SOURCE_VOCAB_SIZE,
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_attention_heads=NUM_HEAD,
    mlp_ratio=FEED_FORWARD / HIDDEN_SIZE,
    multiple_of=1,
    mlp_type="relu",
    mlp_bias=True,
    head_bias=True,
    norm_type=NORM_TYPE,
    layer_norm_epsilon=1e-6,
    position="sinusoidal",
    embed_scale=HIDDEN_SIZE**0.5,
    embedding_dropout=DROPOUT,
    attention_dropout=ATTENTION_DROPOUT,
    residual_dropout=DROPOUT,
    feed_forward_dropout=DROPOUT,
    dtype=DTYPE,
    compile=False,
)

loss = dict(label_smoothing=SMOOTHING, pad_id=2 if SMOOTHING else None)  # <blank>

hybrid_zero_optimizer = dict(clip_grad_norm=0)

adam = dict(
    lr=BASE_LR / _STEPS_OF_AN_UPDATE**0.5,
    adam_beta1=0.9,
    adam_beta2=0.98,
    adam_eps=1e-9,
    weight_decay=0,
)

lr_scheduler = dict(kind="noam", warmup_steps=max(1, WARMUP // _STEPS_OF_AN_UPDATE))

beta2_scheduler = dict(init_beta2=adam["adam_beta2"])

parallel = dict(zero1=-1, tensor=1)

monitor = dict(log_every=4)  # as often as the annotated transformer prints: every 40 micro-batches
