"""Every question with gpt2-medium on a T4, by the homework's own recipe.

It needs some 35 GB of disk: each of the nine full fine-tunings keeps its best and last model.
"""

out_dir = "out/experiments_t4"
