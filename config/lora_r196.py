"""Train LoRA of rank 196."""

out_dir = "out/lora_r196"
lora_rank = 196
lora_alpha = 784
