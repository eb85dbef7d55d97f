# A small decoder on the text of this machine: what `make demo` trains in a few minutes on two CPU cores or one GPU.
#
#   python train.py --config configs/demo.py                                        one process
#   torchrun --nproc_per_node=2 train.py --config configs/demo.py MICRO_NUM=4       two, on the same global batch
#
# UPPER_CASE names are this file's own variables; NAME=value on the command line replaces them before the file runs.
import glob
import importlib.util
import os


def _on_gpu():
    """A CUDA build of torch and a GPU: seen without importing torch, which would take longer than checking a config."""
    torch = importlib.util.find_spec("torch")
    cuda_library = os.path.join(os.path.dirname(torch.origin), "lib", "libtorch_cuda.so") if torch else ""
    return os.path.exists(cuda_library) and bool(glob.glob("/dev/nvidia[0-9]*"))


JOB_NAME = "demo"
DEMO_FOLDER = "demo"  # what tools/demo.py filled: tokens/{train,valid}/<folder>, tokenizer.model

VOCAB_SIZE = 4096
SEQ_LEN = 256
MICRO_BSZ = 1  # a packed row is MICRO_BSZ * SEQ_LEN tokens; many short rows mix the folders better than few long ones
MICRO_NUM = 8  # rows per step and data-parallel rank; divide it by their number to keep the global batch
STEPS = 900
LEARNING_RATE = 4e-3

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=f"local:{DEMO_FOLDER}/ckpts",
    checkpoint_every=STEPS // 9,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=MICRO_NUM,
    micro_bsz=MICRO_BSZ,
    pack_sample_into_one=False,  # attention stays inside each document
    total_steps=STEPS,
    min_length=16,
    train_folder=f"{DEMO_FOLDER}/tokens/train",
    valid_folder=f"{DEMO_FOLDER}/tokens/valid",
    valid_every=STEPS // 4,
    valid_batches=4,
    tokenizer=f"{DEMO_FOLDER}/tokenizer.model",
)

model = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_layers=4,
    num_attention_heads=4,
    mlp_ratio=8 / 3,
    multiple_of=64,
    no_bias=True,
    # A large model starts at 0.02; one this narrow leaves the plateau of token frequencies much sooner from here.
    init_std=0.06,
    # bf16 is 4x faster than fp32 on CPUs that have it in hardware and much slower on the others.
    dtype="torch.bfloat16" if _on_gpu() else "torch.float32",
    layer_norm_epsilon=1e-5,
    checkpoint=False,
    use_flash_attn=True,
    compile=False,  # compiling takes longer than this model trains on a GPU
)

parallel = dict(
    zero1=-1,
    tensor=1,
    pipeline=dict(size=1),
    sequence_parallel=False,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=True,
    reduce_bucket_size=1024 * 1024,  # several buckets even in a model of 2 M parameters
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(
    lr=LEARNING_RATE,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_beta2_c=0,
    adam_eps=1e-8,
    weight_decay=0.1,
)

lr_scheduler = dict(
    total_steps=STEPS,
    warmup_ratio=0.05,
    eta_min=LEARNING_RATE / 10,
)

beta2_scheduler = dict(
    init_beta2=adam["adam_beta2"],
    c=adam["adam_beta2_c"],
)

monitor = dict(
    log_every=1,
    # One prompt per data folder, in the folders' manners.
    sample_prompts=[
        "def __init__(self,",
        "Return the",
        "#pragma once\n\n#include <",
        "Permission is hereby granted,",
    ],
    sample_every=STEPS // 4,
    sample_tokens=64,
)
