"""Pretraining of the small GPT-2 in `assets/`."""
