"""Train LoRA of rank 128, the homework's main run."""

out_dir = "out/lora_r128"
lora_rank = 128
lora_alpha = 512
