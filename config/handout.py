"""Train the handout's architecture: one A for q, k and v, and the output projection adapted too."""

out_dir = "out/handout"
lora_rank = 128
lora_alpha = 512
lora_qkv = "shared"
lora_targets = "c_attn,attn.c_proj"
batch_size = 4
gradient_accumulation_steps = 32
