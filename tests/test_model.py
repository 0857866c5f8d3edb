"""GPT-2 computes what transformers computes, and each fast path equals the plain computation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_models import LORA_TARGETS, TINY
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints.layouts import END_OF_TEXT
from lora import count_parameters, lora_layers, mark_only_lora_as_trainable
from model import GPT, IGNORE, SIZES, GPTConfig
from runtime.device import autocast
from runtime.kv_cache import Cache, KeyValue

ADAPTERS = {"lora_rank": 4, "lora_alpha": 8.0}
MODULES = {target: target for target in LORA_TARGETS} | {"c_attn": "attn.c_attn"}

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def make(**changes: Any) -> GPT:
    """Make a tiny model in which every parameter, B and biases too, changes the output."""
    model = GPT(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(TINY.vocab_size, shape)


def pick_targets(idx: Tensor, supervised: Tensor) -> Tensor:
    """Return the next token where `supervised`, -100 elsewhere."""
    return F.pad(idx[:, 1:], (0, 1), value=0).masked_fill(~supervised, IGNORE)


@torch.no_grad()
def recompute_greedily(model: GPT, idx: Tensor, steps: int) -> Tensor:
    """Decode greedily without a cache, over the last block_size tokens."""
    for _ in range(steps):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def join_tokens(steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([token for _, token in steps], dim=1)


@pytest.mark.parametrize(
    "shape",
    [
        {"n_layer": 1, "n_head": 1, "n_embd": 8},
        {"n_layer": 2, "n_head": 4, "n_embd": 32, "layer_norm_epsilon": 0.1},
        {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 17, "vocab_size": 211},
    ],
    ids=["narrow", "epsilon", "deep"],
)
def test_logits_loss_and_greedy_ids_equal_transformers(
    shape: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"vocab_size": TINY.vocab_size, "n_positions": 40, "initializer_range": 0.3}
    config = GPT2Config(**sizes | shape, bos_token_id=0, eos_token_id=None)
    reference = GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    idx = ids(3, 12)
    labels = idx.masked_fill(torch.rand(3, 12) < 0.4, IGNORE)
    with torch.no_grad():
        expected = reference(idx, labels=labels)
    close(model(idx)[0], expected.logits)
    _, loss = model(idx, F.pad(labels[:, 1:], (0, 1), value=IGNORE))
    close(loss, expected.loss)
    greedy = reference.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    equal(model.generate(idx, 5, temperature=0), greedy)


def test_logits_with_targets_are_the_supervised_rows_in_row_major_order() -> None:
    model, idx = make(), ids(3, 10)
    supervised = torch.rand(3, 10) < 0.3
    targets = pick_targets(idx, supervised)
    logits, loss = model(idx, targets)
    everywhere, no_loss = model(idx)
    assert no_loss is None
    close(logits, everywhere.flatten(0, 1)[supervised.flatten()])
    close(loss, F.cross_entropy(everywhere.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["plain", "lora"])
@pytest.mark.parametrize("batch", [1, 3])
def test_kv_cache_equals_no_cache(changes: dict[str, Any], batch: int) -> None:
    model, prefix, idx = make(**changes), ids(1, 7), ids(batch, 9)
    joint, _ = model(torch.cat((prefix.expand(batch, -1), idx), dim=1))
    close(model(idx, past=model.prefill(prefix))[0], joint[:, 7:])
    close(model(idx, past=model.prefill(ids(1, 0)))[0], model(idx)[0])


def test_prefix_of_several_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="it is 1 sequence, not 3"):
        make().prefill(ids(3, 7))


# Within the block, across its end, exactly full at the start, and longer than it.
@pytest.mark.parametrize(("prompt", "steps"), [(5, 6), (10, 12), (16, 5), (23, 4)])
def test_greedy_generation_equals_full_recomputation(prompt: int, steps: int) -> None:
    model, idx = make(block_size=16, **ADAPTERS).eval(), ids(3, prompt)
    equal(model.generate(idx, steps, temperature=0), recompute_greedily(model, idx, steps))


@pytest.mark.parametrize("prompt", [10, 16, 23])
def test_logits_of_the_sliding_window_equal_recomputation(prompt: int) -> None:
    model, idx = make(block_size=16, **ADAPTERS).eval(), ids(3, prompt)
    for logits, token in model.stream(idx, 12, temperature=0):
        close(logits, model(idx[:, -16:])[0][:, -1])
        idx = torch.cat((idx, token), dim=1)


@pytest.mark.parametrize("prompt", [6, 14, 20])
def test_batched_generation_equals_single(prompt: int) -> None:
    model, idx = make(block_size=16).eval(), ids(4, prompt)
    single = [model.generate(row[None], 6, temperature=0) for row in idx]
    equal(model.generate(idx, 6, temperature=0), torch.cat(single))


@pytest.mark.parametrize("prefix_length", [0, 6])
def test_padded_rows_stream_what_each_would_alone(prefix_length: int) -> None:
    model, lengths, idx = make(**ADAPTERS).eval(), torch.tensor([9, 4, 1]), ids(3, 9)
    prefix = ids(1, prefix_length)
    past = model.prefill(prefix) if prefix_length else None
    steps = list(model.stream(idx, 8, temperature=0, past=past, lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        prompt = idx[row : row + 1, :length]
        alone = recompute_greedily(model, torch.cat((prefix, prompt), dim=1), 8)
        equal(join_tokens(steps)[row : row + 1], alone[:, -8:])
        equal(model.generate(prompt, 8, temperature=0, past=past)[:, length:], alone[:, -8:])
        logits = torch.stack([logits[row] for logits, _ in steps])
        close(logits, model(alone[:, :-1])[0][0, -8:])


@pytest.mark.parametrize("width", [10, 14, 20])  # 20 is wider than the block
@pytest.mark.parametrize("with_past", [False, True])
def test_padding_beyond_the_longest_row_changes_nothing(width: int, with_past: bool) -> None:
    model, idx, lengths = make(block_size=20).eval(), ids(2, 10), torch.tensor([10, 4])
    past = model.prefill(ids(1, 5)) if with_past else None
    padded = F.pad(idx, (0, width - 10), value=7)
    expected = model.stream(idx, 6, temperature=0, past=past, lengths=lengths)
    found = model.stream(padded, 6, temperature=0, past=past, lengths=lengths)
    equal(list(found), list(expected))


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, KeyValue]]:
    """Record what each cache holds after each append: its id, the layer, its keys and values."""
    held = []

    class RecordedCache(Cache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
            all_of_layer = super().append(layer, k, v)
            held.append((id(self), layer, all_of_layer))
            return all_of_layer

    monkeypatch.setattr("model.Cache", RecordedCache)
    return held


# Within the block, across its end, longer than it.
@pytest.mark.parametrize(("prompt", "steps", "slots"), [(5, 6, 10), (10, 12, 16), (23, 4, 16)])
def test_cache_allocates_its_memory_once(
    appended: list[tuple[int, int, KeyValue]], prompt: int, steps: int, slots: int
) -> None:
    list(make(block_size=16).eval().stream(ids(3, prompt), steps, temperature=0))
    assert len(appended) == 2 * steps  # layers · steps
    addresses = {(cache, layer, *(tensor.data_ptr() for tensor in pair))
                 for cache, layer, pair in appended}
    assert len(addresses) == 2  # one pair of buffers per layer
    sizes = {tensor.untyped_storage().nbytes() for _, _, pair in appended for tensor in pair}
    assert sizes == {4 * 3 * slots * TINY.n_embd}  # bytes of float32 · B · slots · H · D


def test_cache_holds_the_keys_and_values_of_prefill(
    appended: list[tuple[int, int, KeyValue]]
) -> None:
    model, idx = make().eval(), ids(1, 6)
    new = torch.cat([token for _, token in model.stream(idx, 4, temperature=0)], dim=1)
    last_of_layers = [pair for _, _, pair in appended[-2:]]
    close(last_of_layers, model.prefill(torch.cat((idx, new[:, :-1]), dim=1)))


def test_cache_has_the_dtype_that_autocast_computes_in(
    appended: list[tuple[int, int, KeyValue]]
) -> None:
    with autocast(torch.device("cpu"), torch.bfloat16):
        list(make().eval().stream(ids(2, 5), 3, temperature=0))
    assert {tensor.dtype for _, _, pair in appended for tensor in pair} == {torch.bfloat16}


def test_cache_gives_positions_and_mask_without_the_padding() -> None:
    cache, prompt = Cache(torch.tensor([3, 1]), slots=5), torch.zeros(2, 1, 3, 4)
    cache.append(0, prompt, prompt)
    cache.advance(3)
    equal(cache.next_positions(), torch.tensor([[3], [1]]))
    seen = torch.tensor([[True, True, True, True], [True, False, False, True]])
    equal(cache.next_mask(), seen[:, None, None])
    cache.advance(1)
    equal(cache.next_positions(), torch.tensor([[4], [2]]))
    equal(cache.next_mask(), F.pad(seen, (0, 1), value=True)[:, None, None])
    assert not cache.is_full()
    cache.advance(1)
    assert cache.is_full()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ADAPTERS,
        ADAPTERS | {"lora_qkv": "shared"},
        ADAPTERS | {"lora_targets": ("attn.c_proj", "mlp.c_fc")},
        ADAPTERS | {"lora_targets": LORA_TARGETS},
        ADAPTERS | {"lora_targets": LORA_TARGETS, "lora_qkv": "shared"},
    ],
    ids=["full", "split", "shared", "two targets", "all split", "all shared"],
)
def test_shared_prefix_equals_the_plain_padded_computation(changes: dict[str, Any]) -> None:
    model, prefix, idx = make(**changes), ids(1, 8), ids(3, 7)
    if changes:
        mark_only_lora_as_trainable(model)
    lengths = torch.tensor([[7], [4], [2]])
    supervised = (torch.arange(7) < lengths - 1) & (torch.arange(7) >= lengths - 3)
    targets = pick_targets(idx, supervised)
    plain_logits, plain_loss = model(
        torch.cat((prefix.expand(3, -1), idx), dim=1), F.pad(targets, (8, 0), value=IGNORE)
    )
    logits, loss = model(idx, targets, model.prefill(prefix))
    close(logits, plain_logits)
    close(loss, plain_loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain, shared = (torch.autograd.grad(x, list(trained.values())) for x in (plain_loss, loss))
    assert min(gradient.abs().max() for gradient in plain) > 1e-4
    close(dict(zip(trained, shared, strict=True)), dict(zip(trained, plain, strict=True)))


def test_gradient_flows_through_prefill() -> None:
    model, idx = make(), ids(2, 5)
    _, loss = model(idx, ids(2, 5), model.prefill(ids(1, 6)))
    loss.backward()
    used_only_by_prefill = model.transformer.wpe.weight.grad[:6]
    assert (used_only_by_prefill.abs().amax(dim=1) > 1e-4).all()


def make_ending() -> GPT:
    """Make a model that says end-of-text after the first position and token 3 after every other."""
    model = GPT(GPTConfig(block_size=64, vocab_size=END_OF_TEXT + 1, n_layer=1, n_head=1, n_embd=8))
    say_end, say_three = torch.tensor([[1.0, -1, 0, 0, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0, 0, 0]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" not in name:
                parameter.zero_()
        model.transformer.wte.weight[END_OF_TEXT] = say_end
        model.transformer.wte.weight[3] = say_three
        model.transformer.wpe.weight[0] = 10 * say_end
        model.transformer.wpe.weight[1:] = 10 * say_three
    return model.eval()


def test_generation_stops_when_every_row_has_ended() -> None:
    out = make_ending().generate(torch.tensor([[5], [6]]), 20, temperature=0)
    equal(out, torch.tensor([[5, END_OF_TEXT], [6, END_OF_TEXT]]))


def test_ended_rows_are_filled_with_end_of_text() -> None:
    idx, lengths = torch.tensor([[5, 0], [6, 7]]), torch.tensor([1, 2])
    steps = list(make_ending().stream(idx, 4, temperature=0, lengths=lengths))
    equal(join_tokens(steps), torch.tensor([[END_OF_TEXT] * 4, [3] * 4]))
    assert steps[1][0][0].argmax() == 3  # without the padding the first row would continue


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 2.0, "top_k": 1}])
def test_temperature_0_and_top_k_1_are_greedy(settings: dict[str, Any]) -> None:
    model, idx = make().eval(), ids(4, 5)
    equal(model.generate(idx, 8, **settings), recompute_greedily(model, idx, 8))


@pytest.mark.parametrize(("top_k", "support"), [(3, 3), (1000, 101), (None, 101)])
def test_top_k_restricts_the_support(top_k: int | None, support: int) -> None:
    model, prompt = make().eval(), ids(1, 5)
    sampled = model.generate(prompt.expand(8000, -1), 1, temperature=20.0, top_k=top_k)[:, -1]
    likeliest = model(prompt)[0][0, -1].topk(support).indices
    equal(sampled.unique(), likeliest.sort().values)


def test_sampling_is_reproducible_with_a_seed() -> None:
    model, idx = make().eval(), ids(4, 5)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(model.generate(idx, 12))
    equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_prompt_past_and_new_tokens_may_fill_the_block_exactly() -> None:
    model, prefix, idx = make(block_size=16).eval(), ids(1, 6), ids(1, 5)
    expected = recompute_greedily(model, torch.cat((prefix, idx), dim=1), 6)
    past = model.prefill(prefix)
    equal(model.generate(idx, 6, temperature=0, past=past), expected[:, 6:])
    with pytest.raises(ValueError, match="7 new tokens exceed block_size=16"):
        model.generate(idx, 7, temperature=0, past=past)


def test_lengths_beyond_the_block_are_refused() -> None:
    steps = make(block_size=16).stream(ids(2, 12), 6, lengths=torch.tensor([3, 12]))
    with pytest.raises(ValueError, match="6 new tokens exceed block_size=16"):
        next(steps)


@pytest.mark.parametrize(("prefix", "length"), [(0, 17), (9, 8)])
def test_sequence_longer_than_the_block_is_refused(prefix: int, length: int) -> None:
    model, idx = make(block_size=16), ids(2, length)
    past = model.prefill(ids(1, prefix)) if prefix else None
    with pytest.raises(ValueError, match=r"sequence of 17 tokens .* block_size=16"):
        model(idx, idx, past)


def test_prefix_longer_than_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens .* block_size=16"):
        make(block_size=16).prefill(ids(1, 17))


@pytest.mark.parametrize("targets", [*((target,) for target in LORA_TARGETS), LORA_TARGETS])
def test_exactly_the_named_projections_are_adapted(targets: tuple[str, ...]) -> None:
    layers = lora_layers(GPT(replace(TINY, **ADAPTERS, lora_targets=targets)))
    assert set(layers) == {f"transformer.h.{i}.{MODULES[t]}" for i in range(2) for t in targets}


@pytest.mark.parametrize(("qkv", "groups"), [("split", 3), ("shared", 1)])
def test_only_the_fused_projection_is_grouped(qkv: str, groups: int) -> None:
    model = GPT(replace(TINY, **ADAPTERS, lora_targets=LORA_TARGETS, lora_qkv=qkv))
    for name, layer in lora_layers(model).items():
        expected = groups if name.endswith("c_attn") else 1
        assert (layer.lora_groups, layer.lora_A.size(0)) == (expected, 4 * expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ("c_attn", "lm_head")}, "unknown lm_head; allowed are c_attn, attn.c_pr"),
        ({"lora_targets": ("c_proj",)}, "unknown c_proj; allowed"),
        ({"lora_targets": (), "lora_rank": 4}, "lora_rank=4 needs"),
        ({"lora_qkv": "spilt"}, "lora_qkv.*spilt"),
        ({"n_head": 3}, "n_embd=32 is not a multiple of n_head=3"),
        ({"lora_rank": 10**8}, "lora_rank=100000000 must be at most 10,000"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("qkv", ["split", "shared"])
def test_fresh_adapters_change_no_output(tiny: GPT, tmp_path: Path, qkv: str) -> None:
    tiny.save_pretrained(tmp_path)
    changes = ADAPTERS | {"lora_targets": LORA_TARGETS, "lora_qkv": qkv}
    adapted, idx = GPT.from_pretrained(str(tmp_path), **changes), ids(2, 9)
    assert all(layer.lora_A.abs().max() > 0 for layer in lora_layers(adapted).values())
    for mode in (True, False):
        equal(adapted.train(mode)(idx)[0], tiny(idx)[0])


@pytest.mark.parametrize("changes", [{"dropout": 0.3}, ADAPTERS | {"lora_dropout": 0.3}])
def test_dropout_acts_in_training_only(changes: dict[str, Any]) -> None:
    model, idx = make(**changes), ids(2, 9)
    sure = GPT(replace(model.config, dropout=0.0, lora_dropout=0.0))
    sure.load_state_dict(model.state_dict())
    assert not torch.allclose(model(idx)[0], model(idx)[0])
    model.eval()
    equal(model(idx)[0], model(idx)[0])
    close(model(idx)[0], sure(idx)[0])


@pytest.mark.parametrize("site", ["drop", "h.1.attn", "h.1.attn.resid_dropout", "h.1.mlp.dropout"])
def test_each_dropout_of_gpt2_acts_by_itself(site: str) -> None:
    model, idx = make(dropout=0.3).eval(), ids(2, 9)
    model.transformer.get_submodule(site).training = True
    assert not torch.allclose(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("training", [True, False])
def test_residual_stream_stays_float32_over_bfloat16_matrices(training: bool) -> None:
    model, idx = mark_only_lora_as_trainable(make(**ADAPTERS)).train(training), ids(2, 9)
    expected, _ = model(idx)
    model.store_frozen_projections(torch.bfloat16)
    stream = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: stream.append(output[0].dtype))
    with autocast(torch.device("cpu"), torch.bfloat16):
        logits, _ = model(idx)
    assert stream == [torch.float32] * 2
    assert (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "freeze", [mark_only_lora_as_trainable, lambda model: model.requires_grad_(False)],
    ids=["base", "all"],
)
def test_only_frozen_projections_are_stored_in_lower_precision(freeze: Callable) -> None:
    model = freeze(make(**ADAPTERS))
    model.store_frozen_projections(torch.bfloat16)
    projections = {f"{name}.weight" for name, module in model.named_modules()
                   if isinstance(module, torch.nn.Linear)}
    assert len(projections) == 8
    for name, parameter in model.named_parameters():
        expected = torch.bfloat16 if name in projections else torch.float32
        assert parameter.dtype == expected, name


def test_trained_projections_keep_their_precision(tiny: GPT) -> None:
    tiny.store_frozen_projections(torch.bfloat16)
    assert {parameter.dtype for parameter in tiny.parameters()} == {torch.float32}


def test_logits_are_not_rounded_to_16_bits() -> None:
    model = mark_only_lora_as_trainable(make(**ADAPTERS))
    with autocast(torch.device("cpu"), torch.bfloat16):
        logits, _ = model(ids(4, 9))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_sizes_are_the_published_ones() -> None:
    millions = {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}
    with torch.device("meta"):
        counts = {name: count_parameters(GPT(shape)).total for name, shape in SIZES.items()}
    assert {name: round(count / 1e6) for name, count in counts.items()} == millions
