"""What is trained, and how its model is built."""
