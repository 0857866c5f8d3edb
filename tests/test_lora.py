"""LoRALinear against its definition, and the adapters of a whole GPT against PEFT."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from made_layers import EXACT, LOW, adapted, adapted_gpt, dense_delta, each_dtype, each_groups
from made_models import TINY
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lora import (
    LoRALinear,
    count_parameters,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from model import GPT, GPTConfig

# --- construction ----------------------------------------------------------------------------


@each_groups
def test_layer_is_a_linear_with_the_documented_attributes(groups: int) -> None:
    layer = LoRALinear(10, 12, True, "cpu", torch.float32, 4, 6.0, 0.1, groups)
    assert isinstance(layer, nn.Linear)
    assert layer.is_lora()
    assert not layer.has_weights_merged
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((groups * 4, 10), (12, 4))
    assert layer.lora_scaling == 6.0 / 4
    assert isinstance(layer.lora_dropout, nn.Dropout)
    assert layer.lora_dropout.p == 0.1
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "lora_A", "lora_B"}


def test_rank_0_is_a_plain_linear() -> None:
    torch.manual_seed(7)
    layer = LoRALinear(10, 12, lora_alpha=3.0, lora_dropout=0.5)
    torch.manual_seed(7)
    plain = nn.Linear(10, 12)
    assert not layer.is_lora()
    assert [name for name in dir(layer) if name.startswith("lora_")] == []
    for mode in (True, False):
        assert_close(layer.train(mode).state_dict(), plain.state_dict(), **EXACT)
        assert_close(layer(torch.ones(3, 10)), plain(torch.ones(3, 10)), **EXACT)


@each_groups
@pytest.mark.parametrize("bias", [True, False])
def test_seed_gives_the_values_of_the_documented_order(groups: int, bias: bool) -> None:
    torch.manual_seed(7)
    layer = LoRALinear(10, 12, bias, lora_rank=2, lora_alpha=3.0, lora_groups=groups)
    torch.manual_seed(7)
    base = nn.Linear(10, 12, bias)  # the first draw
    base.reset_parameters()  # the draw that stays
    lora_A = nn.init.kaiming_uniform_(torch.empty(groups * 2, 10), a=math.sqrt(5))
    expected = {**base.state_dict(), "lora_A": lora_A, "lora_B": torch.zeros(12, 2)}
    assert_close(dict(layer.state_dict()), expected, **EXACT)


def test_adapter_starts_frozen_and_without_effect() -> None:
    layer, x = LoRALinear(10, 12, lora_rank=2, lora_alpha=3.0), torch.randn(3, 10)
    assert not layer.lora_A.requires_grad
    assert not layer.lora_B.requires_grad
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **EXACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": -1}, "lora_rank=-1 must be a whole number of 0 or more"),
        ({"lora_groups": 5}, r"lora_groups=5 must divide out_features=12"),
        ({"lora_groups": 0}, r"lora_groups=0 must divide out_features=12"),
    ],
)
def test_impossible_shape_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(10, 12, **{"lora_rank": 2} | changes)


def test_rank_stabilized_scaling_is_alpha_over_the_root_of_the_rank() -> None:
    torch.manual_seed(7)
    layer = adapted(lora_rank=4, lora_rank_stabilized=True)
    torch.manual_seed(7)
    plain = adapted(lora_rank=4)
    assert (layer.lora_scaling, plain.lora_scaling) == (3.0 / 2, 3.0 / 4)
    assert_close(dict(layer.state_dict()), dict(plain.state_dict()), **EXACT)
    assert_close(layer.delta_weight(), 2 * plain.delta_weight())
    x = torch.randn(5, 10)
    y = F.linear(x, layer.weight + dense_delta(layer), layer.bias)  # alpha / √r is 1.5 here
    assert_close(layer(x), y)
    assert_close(layer.eval()(x), y)


# --- forward ---------------------------------------------------------------------------------


@each_groups
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10), (0, 10)])
def test_forward_is_the_base_plus_the_update(groups: int, bias: bool, shape: tuple) -> None:
    layer, x = adapted(bias=bias, lora_groups=groups), torch.randn(shape)
    assert_close(layer(x), F.linear(x, layer.weight + dense_delta(layer), layer.bias))


def test_split_groups_equal_three_separate_layers_of_the_full_rank() -> None:
    layer, x = adapted(lora_groups=3), torch.randn(5, 10)
    parts = []
    for group in range(3):
        part = adapted(10, 4)
        rows = slice(4 * group, 4 * group + 4)
        part.load_state_dict({
            "weight": layer.weight[rows], "bias": layer.bias[rows],
            "lora_A": layer.lora_A[2 * group : 2 * group + 2], "lora_B": layer.lora_B[rows],
        })
        parts.append(part(x))
    assert_close(layer(x), torch.cat(parts, dim=-1))
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 6
    assert torch.linalg.matrix_rank(adapted(lora_groups=1).delta_weight()) == 2


@each_groups
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_adapter_of_a_low_precision_base_is_float32(dtype: torch.dtype, groups: int) -> None:
    layer, x = adapted(dtype=dtype, lora_groups=groups), torch.randn(5, 10)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.weight.dtype == dtype
    expected = F.linear(x, layer.weight.float() + dense_delta(layer), layer.bias.float())
    y = layer(x.to(dtype))
    with torch.autocast("cpu", dtype):
        y_autocast = layer(x)
    for low in (y, y_autocast):
        assert low.dtype == dtype
        assert_close(low.float(), expected, rtol=0.02, atol=0.05)


@each_groups
def test_dropout_acts_only_on_the_input_of_lora_a_and_only_in_training(groups: int) -> None:
    layer, x = adapted(lora_dropout=0.5, lora_groups=groups), torch.randn(5, 10)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    base = F.linear(x, layer.weight, layer.bias)
    assert_close(y, base + F.linear(dropped, dense_delta(layer)))
    unmerged = LoRALinear.from_linear(
        nn.Linear(10, 12).eval(), 2, 3.0, lora_dropout=0.5, lora_groups=groups)
    unmerged.load_state_dict(layer.state_dict())
    unmerged._demerge()
    assert not unmerged.has_weights_merged
    assert_close(unmerged(x), base + F.linear(x, dense_delta(layer)))


class LargestResult(TorchDispatchMode):
    """Keep the size of the largest tensor that any operation makes (views make none)."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


@each_groups
def test_no_dense_update_is_made_forward_or_backward(groups: int) -> None:
    layer = mark_only_lora_as_trainable(adapted(30, 60, lora_groups=groups))
    with LargestResult() as training:
        layer(torch.randn(2, 30, requires_grad=True)).sum().backward()
    with LargestResult() as merging:
        layer.eval()
    assert training.numel < 30 * 60 == merging.numel


@each_groups
def test_gradients_are_those_of_the_formula(groups: int) -> None:
    layer = mark_only_lora_as_trainable(adapted(4, 6, dtype=torch.float64, lora_groups=groups))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    assert torch.autograd.gradcheck(lambda x, *adapter: layer(x), inputs)


# --- merging ---------------------------------------------------------------------------------


def test_parents_eval_merges_and_train_demerges_however_deep_and_often() -> None:
    stack = nn.Sequential(adapted(), nn.Sequential(nn.ReLU(), nn.Sequential(adapted(12, 10))))
    layers = list(lora_layers(stack).values())
    x, base = torch.randn(5, 10), [layer.weight.detach().clone() for layer in layers]
    merged = [layer.weight.detach() + dense_delta(layer) for layer in layers]
    y = stack(x)
    for _ in range(2):
        for _ in range(2):
            assert stack.eval() is stack
            assert [layer.has_weights_merged for layer in layers] == [True, True]
            assert_close([layer.weight.detach() for layer in layers], merged)
            assert_close(stack(x), y)
        for _ in range(2):
            assert stack.train() is stack
            assert [layer.has_weights_merged for layer in layers] == [False, False]
            assert_close([layer.weight.detach() for layer in layers], base, **EXACT)
            assert_close(stack(x), y, **EXACT)


@each_dtype
@each_groups
def test_demerging_restores_every_bit_after_many_cycles(dtype: torch.dtype, groups: int) -> None:
    layer = adapted(dtype=dtype, lora_groups=groups)
    base = layer.weight.detach().clone()
    merged = (base.float() + dense_delta(layer)).to(dtype)
    for _ in range(16):
        assert_close(layer.eval().weight.detach(), merged)
        assert_close(layer.train().weight.detach(), base, **EXACT)


@each_dtype
@each_groups
def test_delta_is_float32_even_under_autocast(dtype: torch.dtype, groups: int) -> None:
    layer = adapted(dtype=dtype, lora_groups=groups)
    merged = (layer.weight.float() + dense_delta(layer)).to(dtype).detach()
    with torch.autocast("cpu", torch.bfloat16):
        delta = layer.delta_weight()
        layer.eval()
    assert_close(delta, dense_delta(layer))
    assert_close(layer.weight.detach(), merged)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_delta_is_float32_even_where_the_adapter_was_cast(dtype: torch.dtype) -> None:
    layer = adapted().to(dtype)
    assert_close(layer.delta_weight(), dense_delta(layer))


def test_flag_set_by_hand_subtracts_the_update() -> None:
    layer, x = adapted(), torch.randn(5, 10)
    base, y = layer.weight.detach().clone(), layer(x)
    with torch.no_grad():
        layer.weight += dense_delta(layer)
    layer.has_weights_merged = True
    assert_close(layer(x), y)
    assert_close(layer.state_dict()["weight"], base)
    assert_close(layer.train().weight.detach(), base)
    assert not layer.has_weights_merged
    assert_close(layer(x), y)


@each_groups
def test_copy_of_a_merged_layer_is_merged_and_independent(groups: int) -> None:
    layer, x = adapted(lora_groups=groups), torch.randn(5, 10)
    base, y = layer.weight.detach().clone(), layer.eval()(x)
    twin = copy.deepcopy(layer)
    assert_close(twin(x), y, **EXACT)
    assert_close(twin.train().weight.detach(), base, **EXACT)
    assert layer.has_weights_merged
    assert_close(layer(x), y, **EXACT)
    assert_close(layer.train().weight.detach(), base, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_cast_of_a_merged_layer_keeps_its_output_and_its_base(dtype: torch.dtype) -> None:
    layer, x = adapted(), torch.randn(5, 10)
    base, y = layer.weight.detach().clone(), layer(x)
    layer.eval().to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype not in LOW else {"rtol": 0.02, "atol": 0.05}
    assert_close(layer(x.to(dtype)), y.to(dtype), **tolerance)
    assert_close(layer.state_dict()["weight"], base.to(dtype), **EXACT)
    assert_close(layer.train().weight.detach(), base.to(dtype), **EXACT)
    assert_close(layer(x.to(dtype)), y.to(dtype), **tolerance)


# --- checkpoints -----------------------------------------------------------------------------


@each_dtype
def test_state_of_a_merged_layer_is_that_of_the_unmerged_one(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    before = copy.deepcopy(dict(layer.state_dict()))
    assert set(before) == {"weight", "bias", "lora_A", "lora_B"}
    assert_close(dict(layer.eval().state_dict()), before, **EXACT)


@pytest.mark.parametrize("entries", [("weight", "bias", "lora_A", "lora_B"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("saved_training", [True, False])
@pytest.mark.parametrize("loaded_training", [True, False])
def test_no_way_of_saving_and_loading_counts_the_update_twice(
    entries: tuple[str, ...], saved_training: bool, loaded_training: bool
) -> None:
    source, target, x = adapted(), adapted(), torch.randn(5, 10)
    base = target if "weight" not in entries else source
    W0, b = base.weight.detach().clone(), base.bias.detach().clone()
    y = F.linear(x, W0 + dense_delta(source), b)
    state = {name: source.train(saved_training).state_dict()[name] for name in entries}
    target.train(loaded_training).load_state_dict(state, strict=len(entries) == 4)
    assert_close(target(x), y)
    assert_close(target.eval()(x), y)
    assert_close(target.train()(x), y)
    assert_close(target.weight.detach(), W0, **EXACT)


def test_merged_layer_reloads_its_own_state() -> None:
    layer, x = adapted(), torch.randn(5, 10)
    y = layer(x)
    for _ in range(3):
        layer.eval().load_state_dict(layer.state_dict())
        assert layer.has_weights_merged
        assert_close(layer(x), y)


def test_adapter_state_has_exactly_the_adapters_of_the_targets() -> None:
    state = lora_state_dict(adapted_gpt(lora_targets=("c_attn", "mlp.c_proj")).eval())
    assert set(state) == {
        f"transformer.h.{layer}.{target}.{leaf}"
        for layer in range(2) for target in ("attn.c_attn", "mlp.c_proj")
        for leaf in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("training", [True, False])
def test_adapter_state_carries_the_model_over(training: bool) -> None:
    source, target, idx = adapted_gpt(), adapted_gpt(), torch.randint(101, (2, 9))
    base = {name: t for name, t in source.state_dict().items() if "lora" not in name}
    target.load_state_dict(base, strict=False)
    load_lora_state_dict(target.train(training), lora_state_dict(source.eval()))
    assert_close(target(idx)[0], source.train()(idx)[0])
    assert_close(target.eval()(idx)[0], source(idx)[0])


def test_adapter_that_does_not_fit_is_named_and_changes_nothing() -> None:
    stack = nn.Sequential(adapted(), adapted(12, 10)).eval()
    state = {**lora_state_dict(stack), "2.lora_A": torch.ones(2), "1.lora_A": torch.ones(3, 12)}
    del state["0.lora_B"]
    before = copy.deepcopy(dict(stack.state_dict()))
    with pytest.raises(ValueError, match="adapter does not fit") as caught:
        load_lora_state_dict(stack, {name: 2 * tensor for name, tensor in state.items()})
    assert str(caught.value) == (
        "adapter does not fit the model: missing 0.lora_B; unexpected 2.lora_A; "
        "1.lora_A is (3, 12), not (2, 12)"
    )
    assert_close(dict(stack.state_dict()), before, **EXACT)
    assert [layer.has_weights_merged for layer in lora_layers(stack).values()] == [True, True]


# --- training --------------------------------------------------------------------------------


def test_exactly_the_adapters_are_trainable_whatever_the_modules_are_called() -> None:
    names = ("lora_A", "lora_A_projector", "not_lora_A", "lora_B")
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    model["adapted"], model["plain"] = adapted(), LoRALinear(4, 4)
    model["loose"] = nn.ParameterDict({"not_lora_A": torch.ones(1), "lora_B_scale": torch.ones(1)})
    assert mark_only_lora_as_trainable(model) is model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"adapted.lora_A", "adapted.lora_B"}
    assert set(lora_layers(model)) == {"adapted"}


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(adapted(), LoRALinear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    model.append(nn.Linear(4, 4, bias=False))
    model[2].weight = model[1].weight
    count = count_parameters(mark_only_lora_as_trainable(model))
    assert count == (2 * 10 + 12 * 2, 2 * 10 + 12 * 2 + 10 * 12 + 12 + 4 * 4 + 4)
    assert count.share == 44 / 196


def test_homework_adapter_of_gpt2_medium_trains_5_05_percent() -> None:
    shape = GPTConfig(n_layer=24, n_head=16, n_embd=1024, lora_rank=128, lora_alpha=512.0)
    with torch.device("meta"):
        count = count_parameters(mark_only_lora_as_trainable(GPT(shape)))
    assert count.trained == 24 * 3 * 128 * (1024 + 1024) == 18_874_368
    assert f"{count.share:.2%}" == "5.05%"


def test_step_moves_only_the_adapters() -> None:
    model = mark_only_lora_as_trainable(GPT(replace(TINY, lora_rank=2, lora_alpha=3.0)))
    before = copy.deepcopy(dict(model.state_dict()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    idx = torch.randint(101, (2, 9))
    for _ in range(2):  # A has no gradient until the first step takes B away from zero
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(lora_state_dict(model))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == moved


def test_shared_adapter_equals_peft_in_logits_and_every_gradient(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shape = transformers.GPT2Config(
        vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )
    hub = transformers.GPT2LMHeadModel(shape)
    hub.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), lora_rank=4, lora_alpha=6.0, lora_qkv="shared")
    theirs = peft.get_peft_model(hub, peft.LoraConfig(
        r=4, lora_alpha=6.0, target_modules=["c_attn"], fan_in_fan_out=True,
        init_lora_weights=False,
    ))
    their = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }
    load_lora_state_dict(ours, their)
    mark_only_lora_as_trainable(ours)

    idx, targets = torch.randint(101, (3, 12)), torch.randint(101, (3, 12))
    logits = ours(idx)[0]
    expected = theirs.train()(idx).logits
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert_close(gradients, {name: p.grad for name, p in their.items()}, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    assert_close(ours.eval()(idx)[0], theirs.eval()(idx).logits, rtol=1e-5, atol=1e-5)


def test_state_of_loralib_loads_by_name() -> None:
    theirs = loralib.MergedLinear(
        8, 24, r=4, lora_alpha=12, enable_lora=[True] * 3, merge_weights=False)
    nn.init.normal_(theirs.lora_B)
    ours = LoRALinear(8, 24, lora_rank=4, lora_alpha=12.0, lora_groups=3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 8)
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_close(ours.eval()(x), theirs(x), rtol=1e-5, atol=1e-6)
    back = loralib.MergedLinear(
        8, 24, r=4, lora_alpha=12, enable_lora=[True] * 3, merge_weights=False)
    back.load_state_dict(ours.state_dict())
    assert_close(back(x), theirs(x), **EXACT)
