"""Train on programming questions, offline on a CPU in two minutes: can LoRA change the domain?

gpt2-mini has read only film reviews. It learns what Python looks like, not how to program.
"""

task = "python_codes"
init_from = "gpt2-mini"
dataset = "python_codes_mini"
out_dir = "out/python_codes_mini"
train_size = 0
lora_rank = 64
lora_alpha = 256
lora_targets = "c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj"
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 160
learning_rate = 2e-3
warmup_iters = 10
decay_lr = True
min_lr = 2e-4
eval_interval = 40
eval_batch_size = 16
baseline = True
wandb_mode = "disabled"
