"""The whole story offline on a CPU in about two minutes: a small GPT-2, real reviews, LoRA."""

init_from = "gpt2-mini"
dataset = "movie_reviews"
out_dir = "out/quickstart"
train_size = 0
lora_rank = 16
lora_alpha = 64
learning_rate = 2e-3
max_iters = 100
batch_size = 32
gradient_accumulation_steps = 4
decay_lr = True
min_lr = 2e-4
warmup_iters = 5
eval_interval = 20
