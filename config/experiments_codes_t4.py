"""Compare base, LoRA, full fine-tuning and layers on programming questions: gpt2-medium, T4."""

task = "python_codes"
init_from = "gpt2-medium"
out_dir = "out/experiments_codes_t4"
report_dir = "report-codes-t4"
train_size = 0
block_size = 512
batch_size = 8
gradient_accumulation_steps = 2
max_iters = 300
learning_rate = 5e-4
full_learning_rate = 5e-5
warmup_iters = 20
decay_lr = True
min_lr = 5e-5
eval_interval = 100
eval_batch_size = 8
eval_iters = 50
test_size = 400
seeds = 1
