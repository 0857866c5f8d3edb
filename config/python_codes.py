"""Train gpt2-medium with LoRA on flytech/python-codes-25k, on a T4."""

task = "python_codes"
init_from = "gpt2-medium"
out_dir = "out/python_codes"
train_size = 0
block_size = 512
lora_rank = 64
lora_alpha = 128
lora_targets = "c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj"
# 300 × 16 = 4,800 of about 19,850 examples. Logits limit the batch: answer tokens × 50,257.
batch_size = 8
gradient_accumulation_steps = 2
max_iters = 300
learning_rate = 5e-4
warmup_iters = 20
decay_lr = True
min_lr = 5e-5
eval_interval = 100
eval_batch_size = 8
eval_iters = 50
test_size = 400
baseline = True
