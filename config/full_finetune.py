"""Train every weight, with dropout: the homework's full fine-tuning."""

out_dir = "out/full_finetune"
lora_rank = 0
dropout = 0.05
always_save_checkpoint = False  # weights and optimizer state take 5 GB for gpt2-medium
