"""DPO on the sentiment of continued film reviews with gpt2-large, as in the paper: on a T4.

The paper fine-tunes gpt2-large on IMDb first, and draws from 25,000 beginnings (section C.1).
python train.py config/lora_r16.py makes the reward model first.
"""

init_from = "gpt2-large"
data = "imdb"
reward_model = "out/lora_r16"
out_dir = "out/dpo_t4"
train_prompts = 25000
validation_prompts = 256
test_prompts = 512
samples = 4
response_tokens = 48
betas = "0.05,0.1,1,5"
block_size = 64
test_size = 256
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
lora_targets = "all"
batch_size = 16
gradient_accumulation_steps = 4
max_iters = 600
learning_rate = 1e-4
warmup_iters = 50
decay_lr = True
min_lr = 1e-5
eval_interval = 100
wandb_mode = "disabled"
