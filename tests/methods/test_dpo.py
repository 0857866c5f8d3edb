"""DPO's loss is the paper's and trl's, in values and gradients, however its pairs are batched."""

from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from made_families import Family, ids
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from checkpoints.peft_format import PEFT_PREFIX, load_adapter
from dataloader import CustomDataLoader, Example, collate, make_loader
from lora import lora_layers, mark_only_lora_as_trainable
from methods.build import build_model
from methods.dpo import PreferenceConfig, measure, preference_loss
from methods.pairs import Pair, collate_pairs, reference_log_probs
from model import Decoder
from models.families import load_decoder
from runtime.optimizer import configure_optimizer
from tasks.preferences import PreferencesTask
from train import TrainConfig, train_step

CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_rewards_are_the_formula(smoothing: float) -> None:
    policy, reference = 10 * torch.randn(2, 8, dtype=torch.float64)
    losses, chosen, rejected = preference_loss(policy, reference, 0.3, smoothing)
    ratios = (policy[:4] - policy[4:]) - (reference[:4] - reference[4:])
    right = torch.sigmoid(0.3 * ratios).log()
    wrong = torch.sigmoid(-0.3 * ratios).log()
    close(losses, -(1 - smoothing) * right - smoothing * wrong)
    close((chosen, rejected), (0.3 * (policy - reference)[:4], 0.3 * (policy - reference)[4:]))


def test_weight_of_the_gradient_is_the_slope_of_the_loss() -> None:
    policy = torch.randn(2, dtype=torch.float64, requires_grad=True)
    config = PreferenceConfig(beta=0.7, label_smoothing=0.2)
    found = measure(policy, torch.zeros(2, dtype=torch.float64), config)
    (slope, _) = torch.autograd.grad(found.loss, policy)[0]
    close(found.gradient_weight, -slope / config.beta)


def test_far_apart_pairs_have_a_finite_loss_and_gradient() -> None:
    policy = torch.tensor([-1e4, 0.0], requires_grad=True)
    (loss, *_) = preference_loss(policy, torch.zeros(2), 5.0, 0.0)
    loss.sum().backward()
    assert loss.item() == 5e4
    assert policy.grad.tolist() == [-5.0, 5.0]


@pytest.mark.parametrize(("policy", "reference"), [((3,), (3,)), ((4,), (2,)), ((2, 2), (2, 2))])
def test_log_probabilities_that_are_no_pairs_are_refused(policy: Any, reference: Any) -> None:
    with pytest.raises(ValueError, match="log-probabilities of pairs"):
        preference_loss(torch.zeros(policy), torch.zeros(reference), 0.1)


def adapted(family: Family) -> Decoder:
    return mark_only_lora_as_trainable(family.adapted())


def answers(*lengths: int) -> list[Example]:
    return [Example([1, 2, 3, 4], ids(length).tolist()) for length in lengths]


def gradients_of(loss: Tensor, model: Decoder) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, retain_graph=True))


def test_gradient_is_the_weighted_difference_of_both_answers(family: Family) -> None:
    """Question 4.1.c: −β · mean of σ(−m) · (∇ log π(chosen) − ∇ log π(rejected))."""
    model, beta, reference = adapted(family), 0.4, torch.randn(6)
    batch = collate(answers(3, 5, 2, 4, 4, 1), [])
    log_probs = batch.log_probs(model, [])
    found = gradients_of(measure(log_probs, reference, PreferenceConfig(beta=beta)).loss, model)
    expected = [torch.zeros_like(gradient) for gradient in found]
    for i in range(3):
        margin = beta * ((log_probs - reference)[i] - (log_probs - reference)[3 + i]).detach()
        chosen, rejected = (gradients_of(log_probs[row], model) for row in (i, 3 + i))
        for total, one, other in zip(expected, chosen, rejected, strict=True):
            total -= beta * torch.sigmoid(-margin) * (one - other) / 3
    assert max(gradient.abs().max() for gradient in found) > 1e-3
    close(found, expected)


def test_log_probabilities_behind_a_prefix_are_those_of_whole_sequences(family: Family) -> None:
    model, examples = adapted(family), answers(3, 5, 2)
    whole = collate(examples, []).log_probs(model, [])
    logits = [model(torch.tensor([prompt + answer]))[0].log_softmax(-1)[0, 3:-1]
              for prompt, answer in examples]  # each (answer tokens, V)
    close(whole, torch.stack([
        own[range(len(answer)), answer].sum() for own, (_, answer) in
        zip(logits, examples, strict=True)]))
    prefix = model.prefill(torch.tensor([[1, 2, 3]]))
    close(collate(examples, [1, 2, 3]).log_probs(model, prefix), whole)


@pytest.fixture(scope="module")
def trainer(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    """trl's trainer with an adapter whose B is not zero."""
    rows = [{"prompt": f"film {i} is", "chosen": " witty" * (1 + i % 3), "rejected": " dull" * i}
            for i in range(1, 5)]
    checkpointing = {name: False for name in ("activation_checkpointing", "gradient_checkpointing")
                     if name in signature(DPOConfig).parameters}  # trl renamed it
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(llama),
        args=DPOConfig(
            str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=4, beta=0.3,
            use_cpu=True, bf16=False, report_to=[], dataloader_pin_memory=False, **checkpointing),
        train_dataset=Dataset.from_list(rows), processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(llama / "tokenizer.json"), eos_token="<|im_end|>",
            pad_token="<|im_end|>"),
        peft_config=LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM",
                               target_modules=["q_proj", "k_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return trainer


def pair_batch(inputs: dict[str, Tensor], reference: Tensor, config: PreferenceConfig) -> Any:
    """Make ours of trl's batch, which has the chosen answers in its first rows, too."""
    rows = []
    for row, seen, answer in zip(*(inputs[name] for name in (
            "input_ids", "attention_mask", "completion_mask")), strict=True):
        first = int(answer.argmax())
        rows.append(Example(row[:first].tolist(), row[first : int(seen.sum())].tolist()))
    n = len(rows) // 2
    pairs = [Pair(rows[i], rows[n + i], tuple(reference[[i, n + i]].tolist())) for i in range(n)]
    return collate_pairs(pairs, [], config, collate)


def test_loss_rewards_and_gradients_are_those_of_trl(
    trainer: DPOTrainer, llama: Path, tmp_path: Path
) -> None:
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer.model.save_pretrained(tmp_path)
    model = load_decoder(llama, lora_rank=3, lora_alpha=6.0)
    base = load_decoder(llama)
    load_adapter(mark_only_lora_as_trainable(model), tmp_path)
    config = PreferenceConfig(beta=0.3)
    plain = pair_batch(inputs, torch.zeros(8), config)
    batch = replace(plain, reference=plain.rows.log_probs(base, []).detach())
    ours = dict(zip(batch.measures, batch.measure(model, []), strict=True))
    ours["loss"].backward()
    close(ours["loss"], theirs)
    for name, key in {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected",
                      "margin": "rewards/margins", "reward_accuracy": "rewards/accuracies",
                      "chosen_log_prob": "logps/chosen", "rejected_log_prob": "logps/rejected",
                      }.items():
        assert ours[name].item() == pytest.approx(logged[key], abs=1e-4), name
    assert abs(logged["rewards/margins"]) > 0.01
    expected = {name.removeprefix(PEFT_PREFIX).removesuffix(".default.weight"): p.grad
                for name, p in trainer.model.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    close(found, expected)


@pytest.fixture
def preferences(config: TrainConfig, pairs: str) -> TrainConfig:
    return replace(config, task="preferences", dataset=pairs, lora_dropout=0.0, beta=0.5)


def loader_of(config: TrainConfig, model: Decoder) -> CustomDataLoader:
    loader = make_loader(config, model.config)
    reference_log_probs(loader, model, config, torch.float32, None)
    return loader


def test_step_on_pairs_does_not_depend_on_their_batches(preferences: TrainConfig) -> None:
    states, measured = [], []
    for batch_size in (1, 3, 8):
        torch.manual_seed(0)
        model = build_model(preferences.init_from, preferences, CPU, torch.float32)
        loader = loader_of(preferences, model)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        optimizer = torch.optim.SGD(configure_optimizer(model, preferences).param_groups, lr=0.1)
        measured.append(train_step(model, loader.window(0, 8, batch_size), optimizer,
                                   torch.amp.GradScaler("cpu", enabled=False), 0.0, torch.float32))
        states.append(model.state_dict())
    for measures, state in zip(measured[1:], states[1:], strict=True):
        assert measures == pytest.approx(measured[0], abs=1e-4)
        close(state, states[0])
    assert measured[0]["margin"] != 0


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "bottleneck", "prefix"])
def test_reference_is_the_base_whatever_the_method(preferences: TrainConfig, method: str) -> None:
    config = replace(preferences, method=method, prefix_tokens=3, bottleneck_size=4)
    model = build_model(config.init_from, config, CPU, torch.float32).train()
    for parameter in model.parameters():
        if parameter.requires_grad and method not in ("full", "bitfit"):
            torch.nn.init.normal_(parameter, std=0.3)
    loader = make_loader(config, model.config)
    found = reference_log_probs(loader, model, config, torch.float32, None)
    base = load_decoder(config.init_from)
    loader = CustomDataLoader(config.dataset, PreferencesTask(), 128)
    for split, number in (("train", 24), ("validation", 8)):
        pairs = loader.records(split)
        expected = [[collate([loader.encode(pair, i)], []).log_probs(base, []).item()
                     for i in range(2)] for pair in pairs]
        assert found[split].shape == (number, 2)
        close(found[split], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert model.training
