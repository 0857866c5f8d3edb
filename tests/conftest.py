"""What the tests share: tiny random models in the hub's layout, and no way out to the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # set before huggingface_hub is imported; one test undoes it
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch

from model import GPT, GPTConfig

TINY = GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> GPT:
    """A random GPT-2 without adapters, 2 layers, 32 wide, 101 tokens."""
    return GPT(TINY)
