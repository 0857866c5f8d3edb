"""Run every question with gpt2-mini, offline, in about an hour and a half on two CPU cores."""

init_from = "gpt2-mini"
dataset = "movie_reviews"
out_dir = "out/experiments_mini"
train_size = 0
# One epoch of small optimizer steps. Every rank learns at this rate; at 2e-3 rank 196 does not.
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 426
learning_rate = 5e-4
full_learning_rate = 2.5e-4
warmup_iters = 10
decay_lr = True
min_lr = 5e-5
eval_interval = 71
# Small products do not fill two cores: two parallel runs take three quarters of the time.
jobs = 2
