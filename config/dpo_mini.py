"""DPO on the sentiment of continued film reviews with gpt2-mini: offline, on a CPU.

python train.py config/quickstart.py makes the reward model first.
"""

init_from = "gpt2-mini"
data = "movie_reviews"
reward_model = "out/quickstart"
out_dir = "out/dpo_mini"
train_prompts = 4000
validation_prompts = 100
test_prompts = 400
samples = 4
response_tokens = 16
betas = "0.1,0.2,0.3,1"
block_size = 64
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
lora_targets = "all"
batch_size = 32
gradient_accumulation_steps = 2
max_iters = 300
learning_rate = 5e-4
warmup_iters = 10
decay_lr = True
min_lr = 5e-5
eval_interval = 30
test_size = 200
wandb_mode = "disabled"
