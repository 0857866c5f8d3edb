"""Train LoRA of rank 16; add alpha=256 for the homework's second variant."""

out_dir = "out/lora_r16"
lora_rank = 16
lora_alpha = 64
