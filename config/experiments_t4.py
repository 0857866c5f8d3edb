"""Run every question with gpt2-medium on a T4, with the homework's settings.

The runs need about 35 GB of disk: each of the nine full fine-tunings saves its best and last model.
"""

out_dir = "out/experiments_t4"
report_dir = "report-t4"
