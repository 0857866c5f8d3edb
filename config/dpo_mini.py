"""DPO on the sentiment of continued film reviews with gpt2-mini: offline, on a CPU.

python train.py config/quickstart.py makes the reward model first.
"""

init_from = "gpt2-mini"
data = "movie_reviews"
reward_model = "out/quickstart"
out_dir = "out/dpo_mini"
train_prompts = 2000
validation_prompts = 100
test_prompts = 512
samples = 4
response_tokens = 24
betas = "0.05,0.1,1,5"
block_size = 64
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
lora_targets = "all"
batch_size = 32
gradient_accumulation_steps = 2
max_iters = 180
learning_rate = 1e-3
warmup_iters = 10
decay_lr = True
min_lr = 1e-4
eval_interval = 30
test_size = 200
wandb_mode = "disabled"
