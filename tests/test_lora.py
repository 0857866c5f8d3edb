"""LoRALinear against its definition, and the adapters of a whole GPT against PEFT."""

import copy
import math
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lora import (
    LoRALinear,
    adapt,
    adapters_off,
    count_parameters,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from model import GPT, GPTConfig, Projection

LOW = (torch.float16, torch.bfloat16)
EXACT = {"rtol": 0, "atol": 0}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
each_groups = pytest.mark.parametrize("groups", [1, 3])


def adapted(in_features: int = 10, out_features: int = 12, **changes: Any) -> LoRALinear:
    """Return a layer with B away from zero, as training leaves it; alpha / r is 1.5."""
    layer = LoRALinear(in_features, out_features, **{"lora_rank": 2, "lora_alpha": 3.0} | changes)
    nn.init.normal_(layer.lora_B)
    return layer


@torch.no_grad()
def dense_delta(layer: LoRALinear) -> Tensor:
    """The definition: (alpha / r) B A, one group after the other, in float32."""
    pairs = zip(
        layer.lora_B.float().chunk(layer.lora_groups),
        layer.lora_A.float().chunk(layer.lora_groups),
        strict=True,
    )
    return torch.cat([1.5 * B @ A for B, A in pairs])


def adapted_gpt(**changes: Any) -> GPT:
    model = GPT(replace(TINY, **{"lora_rank": 2, "lora_alpha": 3.0} | changes))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


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
        ({"lora_rank": -1}, r"lora_rank=-1 must not be negative"),
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


# --- layers of other models ------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_takes_the_layer_over_without_copying(
    dtype: torch.dtype, bias: bool, training: bool
) -> None:
    linear = nn.Linear(10, 12, bias, dtype=dtype).train(training)
    weight, x = linear.weight.detach().clone(), torch.randn(5, 10, dtype=dtype)
    torch.manual_seed(7)
    layer = LoRALinear.from_linear(linear, 4, 6.0, 0.1, 3, rank_stabilized=True)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert_close(layer.lora_A.detach(), nn.init.kaiming_uniform_(torch.empty(12, 10), math.sqrt(5)))
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert_close(layer.weight.detach(), weight, **EXACT)
    assert_close(layer.lora_B.detach(), torch.zeros(12, 4))
    assert (layer.lora_scaling, layer.lora_dropout.p, layer.lora_groups) == (3.0, 0.1, 3)
    assert layer.training == layer.lora_dropout.training == training
    assert not layer.has_weights_merged
    assert not layer.lora_A.requires_grad
    assert_close(layer.eval()(x), linear(x), **EXACT)


def test_from_linear_stays_on_the_device_and_in_the_class() -> None:
    linear = nn.Linear(10, 12, device="meta")
    layer = Projection.from_linear(linear, 2, 3.0)
    assert type(layer) is Projection
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert type(LoRALinear.from_linear(LoRALinear(10, 12), 2, 3.0)) is LoRALinear


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Embedding(3, 4), TypeError, "Embedding does not compute as nn.Linear does"),
        (Doubling(3, 4), TypeError, "Doubling does not compute as nn.Linear does"),
        (LoRALinear(3, 4, lora_rank=1), ValueError, "already has an adapter"),
        (nn.MultiheadAttention(4, 2).out_proj, ValueError, "out_proj without calling it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_linear_refuses_what_it_cannot_adapt(
    linear: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear, 2, 3.0)


def test_from_linear_refuses_rank_0() -> None:
    with pytest.raises(ValueError, match="lora_rank=0 must be at least 1"):
        LoRALinear.from_linear(nn.Linear(3, 4), 0, 3.0)


class Branches(nn.Module):
    """Names that contain each other, and one layer registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"proj": nn.Linear(4, 4), "c_proj": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"proj": nn.Linear(4, 4), "twin": nn.Linear(4, 4)})
        self.xattn = nn.ModuleDict({"proj": nn.Linear(4, 4), "twin": self.mlp["twin"]})
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.attn, self.mlp, self.xattn):
            for layer in branch.values():
                x = x + layer(self.norm(x)).tanh()
        return x


def shake(model: nn.Module) -> nn.Module:
    """Move every B away from zero, as training does."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["proj"], {"attn.proj", "mlp.proj", "xattn.proj"}),
        (["attn.proj"], {"attn.proj"}),
        ("c_proj", {"attn.c_proj"}),
        (["mlp.proj", "c_proj", "attn.c_proj"], {"mlp.proj", "attn.c_proj"}),
    ],
)
def test_targets_match_whole_components_of_a_name(
    targets: str | list[str], names: set[str]
) -> None:
    model = Branches()
    assert adapt(model, targets, 2, 3.0, 0.1, 2, True) is model
    layers = lora_layers(model)
    assert set(layers) == names
    leaves = {f"{name}.{leaf}" for name in names for leaf in ("lora_A", "lora_B")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == leaves
    for layer in layers.values():
        assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 4), (4, 2))
        assert (layer.lora_scaling, layer.lora_dropout.p) == (3.0 / math.sqrt(2), 0.1)


def test_adapting_changes_no_output_until_b_moves() -> None:
    model, x = Branches(), torch.randn(3, 4)
    y = model(x)
    assert_close(adapt(model, ["proj", "twin"], 2, 3.0)(x), y, **EXACT)
    assert (shake(model)(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("target", ["twin", "xattn.twin"])
def test_shared_layer_stays_shared(target: str) -> None:
    model = adapt(Branches(), [target], 2, 3.0)
    assert model.mlp["twin"] is model.xattn["twin"]
    assert model.mlp["twin"].is_lora()
    assert count_parameters(model).trained == 2 * 4 + 4 * 2
    x = torch.randn(3, 4)
    y = shake(model)(x)
    assert_close(model.eval()(x), y)
    assert_close(model.train()(x), y, **EXACT)


def test_overlapping_targets_draw_each_adapter_once() -> None:
    model, twice = Branches(), Branches()
    twice.load_state_dict(model.state_dict())
    for stack, targets in ((model, ["proj", "twin"]), (twice, ["attn.proj", "proj", "mlp.twin"])):
        torch.manual_seed(7)
        adapt(stack, targets, 2, 3.0)
    assert_close(dict(twice.state_dict()), dict(model.state_dict()), **EXACT)


def test_adapt_keeps_the_class_of_our_own_projections() -> None:
    model = adapt(GPT(TINY), ["attn.c_proj"], 2, 3.0)
    assert {type(layer) for layer in lora_layers(model).values()} == {Projection}
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize(
    ("targets", "changes", "message"),
    [
        (["proj", "q_proj"], {}, r"target 'q_proj' matches nothing; nn.Linear layers are "
                                 r"\['c_proj', 'proj', 'twin'\]"),
        (["proj", "norm"], {}, r"target 'norm' matches \['LayerNorm'\]; nn.Linear layers are"),
        (["proj"], {"groups": 3}, "lora_groups=3 must divide out_features=4"),
        (["proj"], {"rank": 0}, "lora_rank=0 must be at least 1"),
    ],
)
def test_adapt_refuses_before_it_changes_anything(
    targets: list[str], changes: dict[str, int], message: str
) -> None:
    model = Branches()
    with pytest.raises(ValueError, match=message):
        adapt(model, targets, **{"rank": 2, "alpha": 3.0} | changes)
    assert lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapt_refuses_a_second_adapter_on_a_layer() -> None:
    with pytest.raises(ValueError, match="already has an adapter"):
        adapt(adapt(Branches(), ["proj"], 2, 3.0), ["attn.proj"], 2, 3.0)


def test_adapt_refuses_a_weight_that_another_module_shares() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    with pytest.raises(ValueError, match="'lm_head' has a tied weight"):
        adapt(model, ["lm_head"], 2, 3.0)


def test_adapt_refuses_conv1d_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    message = r"'c_attn' matches \['Conv1D'\]; nn.Linear layers are \['lm_head'\]"
    with pytest.raises(ValueError, match=message):
        adapt(transformers.GPT2LMHeadModel(shape), ["c_attn"], 2, 3.0)


# --- torch's own transformer -----------------------------------------------------------------


def encoder() -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(block, 2)


def test_adapter_works_on_the_fast_path_of_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = adapt(encoder(), ["linear1", "linear2"], 2, 3.0), torch.randn(3, 5, 8), []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    base = model(x)
    y = shake(model)(x)
    assert (y - base).abs().max() > 0.1
    assert calls == []
    assert_close(model.eval()(x), y, rtol=1e-5, atol=1e-5)
    assert calls == [1, 1]
    with adapters_off(model):
        assert_close(model(x), base, rtol=1e-5, atol=1e-5)
    assert calls == [1] * 4


def test_adapter_that_is_loaded_in_eval_mode_works_on_the_fast_path() -> None:
    source, x = shake(adapt(encoder(), ["linear1"], 2, 3.0)), torch.randn(3, 5, 8)
    target = adapt(encoder().eval(), ["linear1"], 2, 3.0)
    target.load_state_dict(source.state_dict())
    assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)
    assert all(layer.has_weights_merged for layer in lora_layers(target).values())


@pytest.mark.parametrize("targets", [["out_proj"], ["linear1", "self_attn.out_proj"]])
def test_adapt_refuses_the_output_projection_of_multihead_attention(targets: list[str]) -> None:
    model = encoder()
    with pytest.raises(ValueError, match="MultiheadAttention uses its out_proj without calling it"):
        adapt(model, targets, 2, 3.0)
    assert lora_layers(model) == {}


# --- the base model of an adapted one --------------------------------------------------------


def flags(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]


@each_dtype
@pytest.mark.parametrize("training", [True, False])
def test_adapters_off_computes_the_base_model_exactly(dtype: torch.dtype, training: bool) -> None:
    model, x = Branches().to(dtype), torch.randn(3, 4, dtype=dtype)
    base = model(x)
    shake(adapt(model, ["proj", "twin"], 2, 3.0, dropout=0.5)).train(training)
    before, state = flags(model), copy.deepcopy(dict(model.state_dict()))
    torch.manual_seed(7)
    y = model(x)
    assert not torch.equal(y, base)
    for _ in range(2):
        with adapters_off(model):
            assert_close(model(x), base, **EXACT)
            assert flags(model) == before
            assert_close(dict(model.state_dict()), state, **EXACT)
        torch.manual_seed(7)
        assert_close(model(x), y, **EXACT)
        assert flags(model) == before
        assert {layer.has_weights_merged for layer in lora_layers(model).values()} == {not training}


@pytest.mark.parametrize("training", [True, False])
def test_adapters_off_nests_and_ends_with_an_exception(training: bool) -> None:
    layer, x = adapted().train(training), torch.randn(5, 10)
    y = layer(x)
    with adapters_off(layer):
        base = layer(x)
        with suppress(ZeroDivisionError), adapters_off(layer):
            assert_close(layer(x), base, **EXACT)
            raise ZeroDivisionError
        assert_close(layer(x), base, **EXACT)
    assert_close(base, F.linear(x, layer.unmerged_weight(), layer.bias), **EXACT)
    assert_close(layer(x), y, **EXACT)
    assert layer.has_weights_merged is not training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_change_of_mode_while_adapters_are_off_holds_afterwards(training: bool, depth: int) -> None:
    layer, x = adapted().train(not training), torch.randn(5, 10)
    y, base = layer(x), F.linear(x, layer.unmerged_weight(), layer.bias)
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(adapters_off(layer))
        assert_close(layer.train(training)(x), base, **EXACT)
    assert layer.has_weights_merged is not training
    assert_close(layer(x), y)


def test_adapters_off_leaves_an_unmerged_eval_layer_unmerged() -> None:
    layer = LoRALinear.from_linear(nn.Linear(10, 12).eval(), 2, 3.0)
    with adapters_off(layer):
        assert not layer.has_weights_merged
    assert not layer.has_weights_merged


def test_adapters_off_gives_no_gradient_to_the_adapters() -> None:
    layer = mark_only_lora_as_trainable(adapted())
    with adapters_off(layer):
        assert not layer(torch.randn(5, 10)).requires_grad
    layer(torch.randn(5, 10)).sum().backward()
    assert layer.lora_B.grad.abs().max() > 0


# --- a Llama of transformers, against PEFT ---------------------------------------------------


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_adapted_llama_equals_peft_in_logits_and_every_gradient(rank_stabilized: bool) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    ))
    targets = ["q_proj", "v_proj", "mlp.down_proj"]
    ours = adapt(copy.deepcopy(base), targets, 4, 6.0, rank_stabilized=rank_stabilized)
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=6.0, target_modules=targets, use_rslora=rank_stabilized,
        init_lora_weights=False,
    ))
    their = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }
    load_lora_state_dict(ours, their)

    idx, targets = torch.randint(53, (3, 12)), torch.randint(53, (3, 12))
    logits, expected = ours.train()(idx).logits, theirs.train()(idx).logits
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert_close(gradients, {name: p.grad for name, p in their.items()}, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    assert_close(ours.eval()(idx).logits, theirs.eval()(idx).logits, rtol=1e-5, atol=1e-5)
    with adapters_off(ours), theirs.disable_adapter():
        assert_close(ours(idx).logits, theirs(idx).logits, **EXACT)


@pytest.mark.parametrize("targets", ["", [], [""]])
def test_adapt_refuses_a_target_that_names_nothing(targets: str | list[str]) -> None:
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="target '' matches nothing"):
            adapt(model, targets, 2, 4.0)
        assert all(parameter.requires_grad for parameter in model.parameters())
