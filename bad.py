JOB_NAME = "bad"
SEQ_LEN = 128
data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    total_steps=100,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1),
    max_scale=2**24,
)
adam = dict(lr=1e-4)
lr_scheduler = dict(total_steps=data["total_steps"], eta_min=1e-5)
model = dict(
    num_attention_heads=8,
    vocab_size=512,
    hidden_size=128,
    num_layers=4, tie_source_embeddings=True,
    dtype="torch.float16",
)
parallel = dict(
    zero1=-1,
    tensor=2,
)
