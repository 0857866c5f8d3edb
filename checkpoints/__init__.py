"""Read and write checkpoints in each format."""
