"""Every question with gpt2-medium on a T4, by the homework's own recipe."""

out_dir = "out/experiments_t4"
