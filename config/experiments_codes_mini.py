"""Compare base, LoRA, full fine-tuning and layers on programming questions: gpt2-mini, offline."""

task = "python_codes"
init_from = "gpt2-mini"
dataset = "python_codes_mini"
out_dir = "out/experiments_codes_mini"
report_dir = "report-codes"
train_size = 0
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 150
learning_rate = 2e-3
full_learning_rate = 1e-3
warmup_iters = 10
decay_lr = True
min_lr = 2e-4
eval_interval = 25
eval_batch_size = 16
seeds = 2
