"""The homework's full fine-tuning: every weight is trained, with dropout."""

out_dir = "out/full_finetune"
lora_rank = 0
dropout = 0.05
always_save_checkpoint = False  # weights and optimizer are some 5 GB for gpt2-medium
