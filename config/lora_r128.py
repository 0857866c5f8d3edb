"""The homework's main LoRA run, of rank 128."""

out_dir = "out/lora_r128"
lora_rank = 128
lora_alpha = 512
