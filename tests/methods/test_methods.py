"""Every method trains what its paper says, with the gradients of transformers and peft."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_families import BLOCK, Family, ids, join_tokens, recompute_greedily, supervise_some
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints.files import read_json, read_tensors, write_tensors
from checkpoints.peft_format import ADAPTER, ADAPTER_CONFIG, load_adapter
from methods.build import MethodConfig, build_model, load_checkpoint, save_checkpoint
from model import IGNORE, Decoder
from models.tokenizer import get_tokenizer
from runtime.device import autocast
from runtime.kv_cache import SharedPrefix
from runtime.optimizer import OptimizerConfig, configure_optimizer, set_learning_rate

CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
METHODS = ("bitfit", "bottleneck", "prefix")


def settings(family: Family, method: str, **changes: Any) -> MethodConfig:
    return MethodConfig(init_from=str(family.folder), method=method, prefix_tokens=3,
                        bottleneck_size=5, lora_dropout=0.0, **changes)


def build(family: Family, method: str, **changes: Any) -> Decoder:
    """Build a model whose trained parameters all change its output."""
    if method == "bitfit" and family.name == "llama":
        pytest.skip("it has no biases")
    model = build_model(family.folder, settings(family, method, **changes), CPU, torch.float32)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def trained(model: Decoder) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fresh(family: Family) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(family.folder).eval()


def gradients(model: Decoder, idx: Tensor, targets: Tensor, shared: int) -> dict[str, Tensor]:
    """Return the gradients of a loss whose first `shared` tokens run as a shared prefix."""
    prefix = SharedPrefix(model.prefill, idx[:1, :shared])
    model(idx[:, shared:], targets[:, shared:], prefix.past)[1].backward()
    prefix.backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (3, 9) that begin alike, targets after them, and labels as transformers has."""
    idx = torch.cat((ids(1, 4).expand(3, 4), ids(3, 5)), dim=1)
    targets = supervise_some(idx)
    targets[:, :4] = IGNORE
    return idx, targets, F.pad(targets[:, :-1], (1, 0), value=IGNORE)


def hook_bottlenecks(reference: PreTrainedModel, model: Decoder) -> None:
    """Write the adapter's formula into a model of transformers, with the weights of ours."""
    gpt2 = hasattr(reference, "transformer")
    layers = reference.transformer.h if gpt2 else reference.model.layers
    mine = dict(model.named_parameters())

    def adapt(name: str, _: nn.Module, __: Any, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (mine[f"{name}.bottleneck.{leaf}"] for leaf in (
            "down.weight", "down.bias", "up.weight", "up.bias"))
        return x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)

    for i, layer in enumerate(layers):
        root = next(name for name, module in model.named_modules() if module is model.blocks[i])
        attention = layer.attn.c_proj if gpt2 else layer.self_attn.o_proj
        slot = f"{root}.{'attn' if gpt2 else 'self_attn'}.resid_dropout"
        attention.register_forward_hook(partial(adapt, slot))
        layer.mlp.register_forward_hook(partial(adapt, f"{root}.mlp.dropout"))


@pytest.mark.parametrize("shared", [0, 4])
def test_bitfit_has_the_gradients_of_transformers(family: Family, shared: int) -> None:
    model, reference = build(family, "bitfit"), fresh(family)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(model.get_parameter(model.layout.own_name(name)))
    idx, targets, labels = batch()
    found = gradients(model, idx, targets, shared)
    reference(idx, labels=labels).loss.backward()
    theirs = {model.layout.own_name(name): p.grad for name, p in reference.named_parameters()
              if name.endswith("bias")}
    assert found.keys() == theirs.keys()
    close(found, theirs)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("shared", [0, 4])
def test_bottlenecks_have_the_gradients_of_the_formula_in_transformers(
    family: Family, shared: int, norms: bool
) -> None:
    model, reference = build(family, "bottleneck", bottleneck_norms=norms), fresh(family)
    state = {name: tensor for name, tensor in trained(model).items() if "bottleneck" not in name}
    assert bool(state) == norms
    hook_bottlenecks(reference, model)
    theirs = {name: reference.get_parameter(next(
        n for n, _ in reference.named_parameters() if model.layout.own_name(n) == name))
        for name in state}
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(state[name])
    idx, targets, labels = batch()
    found = {name: grad.clone() for name, grad in gradients(model, idx, targets, shared).items()}
    model.zero_grad()
    reference(idx, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in trained(model).items() if "bottleneck" in name}
    close(found, expected | {name: p.grad for name, p in theirs.items()})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_in_16_bits(family: Family, method: str) -> None:
    if method == "bitfit" and family.name == "llama":
        pytest.skip("it has no biases")
    idx, targets, _ = batch()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        model = build_model(family.folder, settings(family, method), CPU, dtype)
        assert {tensor.dtype for tensor in trained(model).values()} == {torch.float32}
        with autocast(CPU, dtype):
            losses.append(model(idx, targets)[1])
        losses[-1].backward()
        assert all(tensor.grad.isfinite().all() for tensor in trained(model).values())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)


def test_bottlenecks_start_near_the_identity(family: Family) -> None:
    config = settings(family, "bottleneck")
    model, idx = build_model(family.folder, config, CPU, torch.float32), ids(2, 9)
    change = (model(idx)[0] - family.load()(idx)[0]).abs().max()
    assert 0 < change < 1e-3
    assert {tensor.numel() for tensor in trained(model).values()} == {
        5 * 32, 5, 32}  # W_down and W_up, their biases


@pytest.mark.parametrize("inner", [0, 6])
@pytest.mark.parametrize("shared", [0, 4])
def test_prefix_has_the_loss_and_gradients_of_peft(
    family: Family, shared: int, inner: int
) -> None:
    model = build(family, "prefix", prefix_projection=inner)
    prefix = model.learned_prefix
    theirs = get_peft_model(fresh(family), PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=bool(inner),
        encoder_hidden_size=inner or None))
    encoder = theirs.prompt_encoder["default"]
    pairs = {encoder.embedding.weight: prefix.embedding}
    if inner:
        pairs |= dict(zip(encoder.transform.parameters(), prefix.network.parameters(), strict=True))
    with torch.no_grad():
        for their, our in pairs.items():
            their.copy_(our)
    idx, targets, labels = batch()
    gradients(model, idx, targets, shared)
    loss = theirs(input_ids=idx, attention_mask=torch.ones_like(idx), labels=labels).loss
    loss.backward()
    close(model(idx, targets)[1], loss)
    close([our.grad for our in pairs.values()], [their.grad for their in pairs])
    assert sorted(trained(model)) == sorted(
        f"learned_prefix.{name}" for name, _ in prefix.named_parameters())


@pytest.mark.parametrize("inner", [0, 6])
def test_saved_prefix_loads_in_peft(family: Family, inner: int, tmp_path: Path) -> None:
    config, idx = settings(family, "prefix", prefix_projection=inner), ids(2, 9)
    model = build(family, "prefix", prefix_projection=inner)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    theirs = PeftModel.from_pretrained(fresh(family), tmp_path).eval()
    expected = theirs(input_ids=idx, attention_mask=torch.ones_like(idx)).logits
    assert (expected - family.reference(idx).logits).abs().max() > 0.1
    close(model(idx)[0], expected)
    close(load_checkpoint(tmp_path, config, CPU, torch.float32)(idx)[0], expected)


@pytest.mark.parametrize("inner", [0, 6])
def test_prefix_of_peft_loads_here(family: Family, inner: int, tmp_path: Path) -> None:
    theirs = get_peft_model(fresh(family), PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=bool(inner),
        encoder_hidden_size=inner or None))
    theirs.save_pretrained(tmp_path)
    idx = ids(2, 9)
    expected = theirs.eval()(input_ids=idx, attention_mask=torch.ones_like(idx)).logits
    model = load_checkpoint(tmp_path, settings(family, "prefix"), CPU, torch.float32)
    close(model(idx)[0], expected.detach())


def test_prefix_stands_before_what_is_generated(family: Family) -> None:
    model, idx = build(family, "prefix").eval(), ids(3, 9)
    model.config = family.load().config
    prompts = [row[:length] for row, length in zip(idx.tolist(), (9, 4, 1), strict=True)]
    steps = model.stream(prompts, 6, temperature=0)
    tokens = join_tokens(list(steps))
    past = model.prefill(ids(1, 0))
    for row, length in enumerate((9, 4, 1)):
        alone = recompute_greedily(model, idx[row : row + 1, :length], 6)[:, length:]
        equal(tokens[row : row + 1], alone)
        equal(model.generate(idx[row : row + 1, :length], 6, temperature=0, past=past)[:, length:],
              alone)


def test_prefix_starts_as_the_model_with_other_tokens_before(family: Family) -> None:
    config = settings(family, "prefix")
    torch.manual_seed(3)
    model, idx = build_model(family.folder, config, CPU, torch.float32), ids(2, 9)
    torch.manual_seed(3)
    family.load()  # draws what loading draws
    words = torch.randint(101, (1, 3))
    whole = torch.cat((words.expand(2, 3), idx), dim=1)
    close(model(idx)[0], family.load()(whole)[0][:, 3:])


def test_prefix_leaves_room_for_text(family: Family) -> None:
    model = build(family, "prefix")
    with pytest.raises(ValueError, match=f"sequence of {BLOCK + 1} tokens is longer than"):
        model(ids(1, BLOCK - 2))
    model(ids(1, BLOCK - 3))
    full = MethodConfig(method="prefix", prefix_tokens=BLOCK)
    with pytest.raises(ValueError, match=f"prefix_tokens={BLOCK} must leave room"):
        build_model(family.folder, full, CPU, torch.float32)


def test_rank_stabilized_adapters_answer_alike_in_peft(family: Family, tmp_path: Path) -> None:
    config = settings(family, "lora", lora_rank=4, lora_alpha=6.0,
                      lora_scaling="rank_stabilized")
    model = build_model(family.folder, config, CPU, torch.float32)
    for name, parameter in trained(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    assert read_json(tmp_path / ADAPTER_CONFIG)["use_rslora"]
    theirs, idx = PeftModel.from_pretrained(fresh(family), tmp_path).eval(), ids(2, 9)
    close(model(idx)[0], theirs(idx).logits)
    plain = settings(family, "lora", lora_rank=4, lora_alpha=6.0)
    with pytest.raises(ValueError, match=r"adapter has (use_rslora|alpha_pattern)="):
        load_checkpoint(tmp_path, plain, CPU, torch.float32)


def test_lora_plus_takes_the_steps_of_peft(family: Family, tmp_path: Path) -> None:
    changes = {"lora_qkv": "shared"} if family.name == "gpt2" else {}
    config = settings(family, "lora", lora_rank=4, lora_plus_ratio=16.0, **changes)
    model = build_model(family.folder, config, CPU, torch.float32)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    theirs = PeftModel.from_pretrained(fresh(family), tmp_path, is_trainable=True)
    rates = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    ours = configure_optimizer(model, rates, config.lora_plus_ratio)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1,
        betas=(rates.beta1, rates.beta2))
    idx, targets, labels = batch()
    set_learning_rate(ours, 0, rates)
    for _ in range(3):
        model(idx, targets)[1].backward()
        theirs(idx, labels=labels).loss.backward()
        for optimizer in (ours, other):
            optimizer.step()
            optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    there = build_model(family.folder, config, CPU, torch.float32)
    load_adapter(there, tmp_path)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter, there.get_parameter(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_restores_every_bit(family: Family, method: str, tmp_path: Path) -> None:
    model, config = build(family, method), settings(family, method)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    loaded, idx = load_checkpoint(tmp_path, config, CPU, torch.float32), ids(2, 9)
    equal(loaded(idx)[0], model(idx)[0])
    assert (model(idx)[0] - family.load()(idx)[0]).abs().max() > 1e-2


def damage_name(folder: Path) -> None:
    tensors = read_tensors(folder / ADAPTER)
    write_tensors(folder / ADAPTER, {f"x.{name}": tensor for name, tensor in tensors.items()})


def damage_number(folder: Path) -> None:
    tensors = read_tensors(folder / ADAPTER)
    write_tensors(folder / ADAPTER, {name: t.new_full(t.shape, torch.nan)
                                     for name, t in tensors.items()})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("damage", "said"), [
    (damage_name, "does not fit the model: missing "),
    (damage_number, "holds NaN or infinite numbers")])
def test_damaged_checkpoint_is_refused(
    method: str, damage: Callable[[Path], None], said: str, checkpoint: str, tmp_path: Path
) -> None:
    config = MethodConfig(init_from=checkpoint, method=method)
    model = build_model(checkpoint, config, CPU, torch.float32)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    damage(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(tmp_path, config, CPU, torch.float32)


@pytest.mark.parametrize("other", [*METHODS, "lora"])
@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_folder_of_another_method_is_refused(
    method: str, other: str, checkpoint: str, tmp_path: Path
) -> None:
    config = MethodConfig(init_from=checkpoint, method=method, lora_rank=2)
    model = build_model(checkpoint, config, CPU, torch.float32)
    save_checkpoint(tmp_path, config, model, get_tokenizer())
    asked = MethodConfig(init_from=checkpoint, method=other, lora_rank=2)
    if method == other:
        load_checkpoint(tmp_path, asked, CPU, torch.float32)
    else:
        with pytest.raises(ValueError, match=r"holds|adapter has"):
            load_checkpoint(tmp_path, asked, CPU, torch.float32)


def test_biases_of_a_model_without_any_are_refused(family: Family) -> None:
    if family.name == "llama":
        with pytest.raises(ValueError, match="method=bitfit trains biases, but this Llama has no"):
            build_model(family.folder, settings(family, "bitfit"), CPU, torch.float32)


def test_full_fine_tuning_has_two_names(checkpoint: str) -> None:
    for config in (MethodConfig(method="full"), MethodConfig(lora_rank=0)):
        model = build_model(checkpoint, config, CPU, torch.float32)
        assert trained(model).keys() == dict(model.named_parameters()).keys()
        assert config.trained == "full"
        assert not config.keeps_base
