"""Tiny models of each family, all with GPT-2's tokenizer."""

from dataclasses import replace

import pytest
import torch

from models.llama import Llama, LlamaConfig
from models.tokenizer import get_tokenizer
from train import TrainConfig


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama of GPT-2's vocabulary, 16 wide, in the hub's layout."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("llama")
    model = Llama(LlamaConfig(
        block_size=256, vocab_size=50257, n_layer=2, n_head=4, n_kv_head=2, head_size=6, n_embd=16,
        mlp_size=24, tied=True))
    for parameter in model.parameters():  # its answers depend on the text
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def _gpt2_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every model GPT-2's tokenizer, which no tiny Llama brings."""
    for place in ("bench.rivals", "bench.worker"):
        monkeypatch.setattr(f"{place}.load_tokenizer", lambda name: get_tokenizer())


@pytest.fixture(params=["gpt2", "gpt2 shared", "llama"])
def family(
    request: pytest.FixtureRequest, config: TrainConfig, llama: str, _gpt2_tokenizer: None
) -> TrainConfig:
    """Settings of a tiny model of each family; a GPT-2's q, k and v share one A or do not."""
    if request.param == "llama":
        return replace(config, init_from=llama)
    return replace(config, lora_qkv="shared" if "shared" in request.param else "split")
