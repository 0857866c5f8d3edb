"""Adapters on the layers of any model: taken over, found by name, switched off, equal to PEFT."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_layers import EXACT, adapted, each_dtype
from made_models import TINY
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from lora import (
    LoRALinear,
    adapt,
    adapters_off,
    count_parameters,
    load_lora_state_dict,
    lora_layers,
    mark_only_lora_as_trainable,
)
from model import GPT, Projection

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


@pytest.mark.parametrize("rank", [2.0, "2", True, None, -1, math.nan])
def test_rank_that_is_no_whole_number_is_refused_by_name(rank: Any) -> None:
    message = re.escape(f"lora_rank={rank!r} must be a whole number of 0 or more")
    for make in (
        lambda: LoRALinear(3, 4, lora_rank=rank),
        lambda: LoRALinear.from_linear(nn.Linear(3, 4), rank, 3.0),
        lambda: adapt(Branches(), ["proj"], rank, 3.0),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_rank_of_numpy_is_a_whole_number() -> None:
    assert LoRALinear(3, 4, lora_rank=np.int64(2)).lora_A.shape == (2, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm,
     nn.utils.spectral_norm, partial(prune.random_unstructured, name="weight", amount=0.5),
     partial(prune.random_unstructured, name="bias", amount=0.5), lambda _: nn.LazyLinear(4)],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "pruned weight",
         "pruned bias", "lazy"],
)
def test_adapt_refuses_a_weight_or_bias_that_torch_computes(wrap: Callable) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": wrap(nn.Linear(4, 4))})
    flags = [parameter.requires_grad for parameter in model.parameters()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(TypeError, match="v_proj: its weight or bias is no plain parameter"):
        adapt(model, ["q_proj", "v_proj"], 2, 3.0)
    assert lora_layers(model) == {}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert_close(dict(model.named_buffers()), buffers, **EXACT)


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
    with pytest.raises(ValueError, match=r"^attn\.proj: the layer already has an adapter"):
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
