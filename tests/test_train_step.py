"""The training step is exact, whatever its batches and wherever its prefix runs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dataloader import make_loader
from lora import lora_layers, lora_state_dict
from methods.build import build_model
from model import GPT, IGNORE
from runtime.kv_cache import SharedPrefix
from runtime.optimizer import configure_optimizer
from train import TrainConfig, train_step, validate

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def fresh_model(config: TrainConfig) -> GPT:
    """A model whose adapters have a B, so that gradients reach A."""
    torch.manual_seed(0)
    model = build_model(config.init_from, config, CPU, torch.float32)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


@pytest.mark.parametrize("rank", [0, 4])
def test_one_by_eight_equals_four_by_two(config: TrainConfig, rank: int) -> None:
    """Plain SGD shows the gradient itself; Adam would hide its scale."""
    config = replace(config, lora_rank=rank, lora_dropout=0.0)
    states, losses = [], []
    for batch_size in (1, 4, 3, 8):  # 3: batches of 3, 3 and 2, so of unequal weight
        model = fresh_model(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        window = make_loader(config, model.config).window(2, 8, batch_size)
        optimizer = torch.optim.SGD(trained, lr=1.0)
        losses.append(train_step(model, window, optimizer, NO_SCALER, 0.0, torch.float32)["loss"])
        states.append(model.state_dict())
    for state, loss in zip(states[1:], losses[1:], strict=True):
        torch.testing.assert_close(state, states[0], rtol=1e-5, atol=1e-5)
        assert loss == pytest.approx(losses[0], abs=1e-5)


def test_gradient_checkpointing_changes_no_bit_and_keeps_less(config: TrainConfig) -> None:
    """With dropout, which must draw the same again."""
    states, kept = [], []
    for checkpointing in (False, True):
        changed = replace(config, dropout=0.1, gradient_checkpointing=checkpointing)
        model = fresh_model(changed)
        window = make_loader(changed, model.config).window(0, 8, 4)
        weights, sizes = {p.data_ptr() for p in model.parameters()}, []

        def note(t: torch.Tensor, weights: set = weights, sizes: list = sizes) -> torch.Tensor:
            sizes.append(t.numel() * (t.data_ptr() not in weights))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.nats(window[0].inputs, window[0].targets)
        kept.append(sum(sizes))
        optimizer = configure_optimizer(model, changed)
        train_step(model, window, optimizer, NO_SCALER, 1.0, torch.float32)
        states.append(lora_state_dict(model))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("targets", ["c_attn", "mlp.c_fc"])
def test_prefix_differentiated_once_gives_the_gradient_of_the_whole(
    config: TrainConfig, targets: str
) -> None:
    """With mlp.c_fc the first layer's keys and values depend on no adapter."""
    model = fresh_model(replace(config, lora_dropout=0.0, lora_targets=targets))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = make_loader(config, model.config).window(0, 8, 3)
    prefix = SharedPrefix(model.prefill, batches[0].prefix)
    losses = [model(batch.inputs, batch.targets, prefix.past)[1] for batch in batches]
    for loss in losses:
        loss.backward()
    prefix.backward()
    plain = [model(torch.cat((batch.prefix.expand(len(batch.inputs), -1), batch.inputs), dim=1),
                   F.pad(batch.targets, (batch.prefix.size(1), 0), value=IGNORE))[1]
             for batch in batches]
    expected = torch.autograd.grad(sum(plain), trained)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([p.grad for p in trained], list(expected), rtol=1e-4, atol=1e-5)


def test_prefix_that_no_adapter_acts_on_has_nothing_to_differentiate(config: TrainConfig) -> None:
    model = fresh_model(config).requires_grad_(False)
    batch = make_loader(config, model.config).window(0, 8, 8)[0]
    prefix = SharedPrefix(model.prefill, batch.prefix)
    assert prefix.past
    assert not any(tensor.requires_grad for pair in prefix.past for tensor in pair)
    prefix.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_step_moves_only_the_adapters(config: TrainConfig) -> None:
    model = fresh_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    window = make_loader(config, model.config).window(0, 8, 4)
    train_step(model, window, configure_optimizer(model, config), NO_SCALER, 1.0, torch.float32)
    moved = {name for name, tensor in model.state_dict().items()
             if not torch.equal(tensor, before[name])}
    assert moved == set(lora_state_dict(model))


@pytest.mark.parametrize("rank", [0, 4])
def test_only_what_is_trained_goes_over_the_wire(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    config, sent = replace(config, lora_rank=rank), []
    monkeypatch.setattr("runtime.processes.dist.is_initialized", lambda: True)
    monkeypatch.setattr("runtime.processes.dist.all_reduce", lambda flat: sent.append(flat.numel()))
    model = fresh_model(config)
    window = make_loader(config, model.config).window(0, 8, 4)
    train_step(model, window, configure_optimizer(model, config), NO_SCALER, 0.0, torch.float32)
    losses, trained = len(window), sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sent == [losses + trained]
    assert (trained == lora_parameters(model)) is bool(rank)


def lora_parameters(model: GPT) -> int:
    return sum(tensor.numel() for tensor in lora_state_dict(model).values())


def test_gradient_clipping_bounds_the_step(config: TrainConfig) -> None:
    def step_norm(grad_clip: float) -> float:
        model = fresh_model(config)
        before = lora_state_dict(model)
        before = {name: tensor.clone() for name, tensor in before.items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        window = make_loader(config, model.config).window(0, 8, 4)
        train_step(model, window, optimizer, NO_SCALER, grad_clip, torch.float32)
        after = lora_state_dict(model)
        return math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))

    assert step_norm(0.0) > 0.02
    assert step_norm(0.01) == pytest.approx(0.01, rel=1e-3)


def test_non_finite_loss_stops_before_any_weight_moves(config: TrainConfig) -> None:
    model = fresh_model(config)
    with torch.no_grad():
        lora_layers(model)["transformer.h.0.attn.c_attn"].lora_B.fill_(math.inf)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    window = make_loader(config, model.config).window(0, 8, 4)
    with pytest.raises(FloatingPointError, match="the loss of batch 1 of 2 is nan"):
        train_step(model, window, configure_optimizer(model, config), NO_SCALER, 1.0, torch.float32)
    torch.testing.assert_close(lora_state_dict(model), before, rtol=0, atol=0)


def test_validation_loss_is_the_mean_over_supervised_tokens(config: TrainConfig) -> None:
    model = fresh_model(config)
    loader = make_loader(config, model.config)
    records = loader.records("validation")
    model.eval()
    singly = [model(batch.inputs, batch.targets, model.prefill(batch.prefix))[1]
              for batch in loader.batches(records, 1)]
    expected = float(torch.stack(singly).mean())  # each review supervises two tokens
    for batch_size in (1, 5, 12):
        found = validate(model, loader.batches(records, batch_size), torch.float32)
        assert found == {"loss": pytest.approx(expected, abs=1e-5)}
    assert model.training


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.faults)])  # a minute of C++
def test_compiled_blocks_train_like_the_plain_ones(config: TrainConfig, backend: str) -> None:
    config = replace(config, lora_dropout=0.0)
    losses = []
    for compiled in (False, True):
        model = fresh_model(config)
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=True, backend=backend)
        optimizer, loader = configure_optimizer(model, config), make_loader(config, model.config)
        losses.append([train_step(model, loader.window(i, 8, 4), optimizer, NO_SCALER, 1.0,
                                  torch.float32)["loss"] for i in range(3)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][2] != pytest.approx(losses[0][0], abs=1e-4)
