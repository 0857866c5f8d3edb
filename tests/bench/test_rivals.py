"""The baselines compute the same loss, gradients and answers as this package."""

from dataclasses import replace

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from bench.rivals import NEW_TOKENS, HandoutStyle, PeftStyle, padded
from checkpoints.peft_format import peft_state_dict
from generate import ModelSampler
from lora import lora_layers
from methods.build import build_model
from model import IGNORE
from train import TrainConfig

CPU = torch.device("cpu")


def contenders(config: TrainConfig) -> tuple:
    """Return ours, the handout's and PEFT's model with equal adapters (B ≠ 0), and the data.

    PEFT's is None if it cannot have our adapters: one pair each for parts of a fused matrix.
    """
    config = replace(config, lora_dropout=0.0)
    ours = build_model(config.init_from, config, CPU, torch.float32)
    handout, peft = (cls(config.init_from, config, CPU) for cls in (HandoutStyle, PeftStyle))
    layers = lora_layers(ours).values()
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    handout.model.load_state_dict(ours.state_dict())
    if any(layer.lora_groups > 1 for layer in layers):
        return ours, handout, None, handout.loader
    loaded = set_peft_model_state_dict(peft.model, peft_state_dict(ours)[1])
    assert not loaded.unexpected_keys
    return ours, handout, peft, handout.loader


def gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_losses_and_gradients_are_equal(family: TrainConfig) -> None:
    ours, handout, peft, loader = contenders(family)
    records = loader.records("train")[:6]
    (batch,) = loader.batches(records, 6)
    expected = ours(batch.inputs, batch.targets, ours.prefill(batch.prefix))[1]
    expected_gradients = gradients(expected, ours)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected_gradients)
    for rival in filter(None, (handout, peft)):
        loss = rival.loss(records)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            gradients(loss, rival.model), expected_gradients, rtol=0, atol=1e-5)


def test_answers_are_equal(family: TrainConfig) -> None:
    ours, handout, peft, loader = contenders(family)
    records = loader.records("test")
    sampler = ModelSampler(ours, loader, batch_size=5, max_new_tokens=NEW_TOKENS)
    expected = [prediction.generated for prediction in sampler.predict(records)]
    assert len(set(expected)) > 1
    for rival in filter(None, (handout, peft)):
        assert rival.score(records) == expected


def test_handout_style_never_merges(config: TrainConfig) -> None:
    _, handout, _, _ = contenders(config)
    layers = lora_layers(handout.model)
    before = [layer.weight.clone() for layer in layers.values()]
    handout.model.eval()
    assert len(layers) == 2
    for layer, weight in zip(layers.values(), before, strict=True):
        assert not layer.has_weights_merged
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)


def test_padding_is_neither_supervised_nor_attended(config: TrainConfig) -> None:
    loader = contenders(config)[3]
    records = loader.records("train")[:5]
    idx, targets, mask = padded(loader, records)
    lengths = [len(example.prompt + example.answer) for example in map(loader.encode, records)]
    assert len(set(lengths)) > 1
    assert idx.shape == targets.shape == (5, max(lengths))
    assert mask.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    assert (targets[mask == 0] == IGNORE).all()
    assert ((targets != IGNORE).sum(dim=1) == 2).all()  # the label word and end-of-text
