"""Train a small GPT-2 with LoRA on real reviews, offline on a CPU, in about two minutes."""

init_from = "gpt2-mini"
dataset = "movie_reviews"
out_dir = "out/quickstart"
train_size = 0
# Two epochs. A small model needs small optimizer steps and a high rate, which then decays.
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
