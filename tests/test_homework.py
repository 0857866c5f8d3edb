"""What docs/homework.md says about other methods: its counts, and why a prefix keeps attention."""

import re
from pathlib import Path

import torch
from made_models import close
from torch import Tensor, nn

from lora import count_parameters
from methods.bitfit import train_biases
from methods.bottleneck import Bottleneck
from model import GPT
from runtime.attention import attend

TEXT = (Path(__file__).parents[1] / "docs" / "homework.md").read_text()
LAYERS, WIDTH, SIZE = 10, 512, 16


def answer(question: str) -> str:
    """Return the last cell of the table's row that begins with `question`."""
    (number,) = re.findall(rf"^\| {re.escape(question)}.*\| (\S+(?: %)?) \|$", TEXT, re.MULTILINE)
    return number


def sigmoid_network(*more: type[nn.Module]) -> nn.Sequential:
    """Ten layers of a width, each a product and a sigmoid, then `more` of the width and a size."""
    return nn.Sequential(*(nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), *(kind(WIDTH, SIZE) for kind in more))
        for _ in range(LAYERS)))


def test_counts_of_the_network_and_of_bitfit() -> None:
    network = sigmoid_network()
    train_biases(network)
    count = count_parameters(network)
    assert answer("hidden units") == f"{LAYERS * WIDTH:,}"
    assert answer("parameters:") == f"{count.total:,}"
    assert answer("BitFit trains the biases") == f"{count.trained:,}"
    (share, _) = re.findall(r"^\| its share .*\| (\S+ %) \|$", TEXT, re.MULTILINE)
    assert share == f"{100 * count.share:.2f} %"


def test_counts_of_the_bottlenecks() -> None:
    network = sigmoid_network(Bottleneck).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            module.requires_grad_(True)
    count = count_parameters(network)
    assert answer("a bottleneck of width") == f"{count.trained:,}"
    (_, share) = re.findall(r"^\| its share .*\| (\S+ %) \|$", TEXT, re.MULTILINE)
    assert share == f"{100 * count.share:.2f} %"


def heads(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return queries and keys of a GPT-2 layer for `x` (B, T, C), each (B, H, T, D)."""
    qkv = layer.c_attn(x).unflatten(-1, (3, layer.n_head, -1)).permute(2, 0, 3, 1, 4)
    return [*qkv[:2]]


def test_prefix_keeps_the_ratios_of_attention_between_words(tiny: GPT) -> None:
    layer, words, size = tiny.blocks[0].attn, 6, 16
    q, k = heads(layer, 3 * torch.randn(2, words, 32))
    seen = torch.eye(words, size).expand(2, layer.n_head, words, size)  # values that show weights
    prefix = 2 * torch.randn(1, layer.n_head, 4, size), torch.zeros(1, layer.n_head, 4, size)
    alone = attend(q, k, seen, None, None)[..., :words]  # (B, H, T, S)
    behind = attend(q, k, seen, prefix, None)[..., :words]
    share = behind.sum(dim=-1, keepdim=True)  # 1 - lambda
    assert 0 < share.min() < share.max() < 0.95
    close(behind / share, alone)


def test_output_is_a_mixture_of_words_and_prefix(tiny: GPT) -> None:
    layer, words, size = tiny.blocks[0].attn, 6, 16
    q, k = heads(layer, 3 * torch.randn(2, words, 32))
    v = torch.randn(2, layer.n_head, words, size)
    prefix = 2 * torch.randn(1, layer.n_head, 4, size), torch.randn(1, layer.n_head, 4, size)
    scale = size**-0.5
    future = torch.ones(words, words, dtype=torch.bool).triu(1)
    own = (scale * q @ k.mT).masked_fill(future, -torch.inf).logsumexp(dim=-1)  # log Z
    before = (scale * q @ prefix[0].mT).logsumexp(dim=-1)  # log Z_P
    mix = torch.sigmoid(before - own)[..., None]  # lambda
    on_prefix = (scale * q @ prefix[0].mT).softmax(dim=-1) @ prefix[1]
    close(attend(q, k, v, prefix, None), (1 - mix) * attend(q, k, v, None, None) + mix * on_prefix)
