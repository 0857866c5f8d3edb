"""What GPT-2 has alone: its shapes, fused q, k and v; and the sampling that all families share.

The contracts that every family keeps are in `models/test_families.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_families import ids, join_tokens, pick_targets, recompute_greedily
from made_models import LORA_TARGETS, TINY
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints.layouts import END_OF_TEXT
from lora import count_parameters, lora_layers, mark_only_lora_as_trainable
from model import GPT, IGNORE, SIZES, GPTConfig
from runtime import kernels, kv_cache
from runtime.kv_cache import Cache

ADAPTERS = {"lora_rank": 4, "lora_alpha": 8.0}

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def make(**changes: Any) -> GPT:
    """Make a tiny model in which every parameter, B and biases too, changes the output."""
    model = GPT(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "shape",
    [
        {"n_layer": 1, "n_head": 1, "n_embd": 8},
        {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 17, "vocab_size": 211},
    ],
    ids=["narrow", "deep"],
)
def test_narrow_and_deep_shapes_equal_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
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


def test_cache_gives_each_row_its_next_slot() -> None:
    cache = Cache(tokens=10)
    cache.shape(places=2, slots=5)
    ((part, last),) = cache.turns(ids(0, 1), [[4, 5, 6], [7]])
    equal(part, torch.tensor([[4, 5, 6], [7, 0, 0]]))
    equal(last, torch.tensor([[2], [0]]))
    for more in (0, 1):
        for tokens, at in cache.turns(ids(2, 1), []):
            assert (tokens.shape, at) == ((2, 1), None)
            equal(cache.next_positions(), torch.tensor([[3], [1]]) + more)
            seen = torch.arange(5) <= torch.tensor([[3], [1]]) + more
            equal(cache.next_mask(), seen[:, None, None])
    assert cache.used == [5, 3]


def test_cache_runs_prompts_in_parts_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "PART_TOKENS", 8)
    cache, prompts = Cache(tokens=28), [row.tolist() for row in map(ids, (2, 3, 4, 7))]
    first, second = cache.turns(ids(0, 1), prompts)
    assert [part.shape for part, _ in (first, second)] == [(2, 3), (2, 7)]
    assert [at.tolist() for _, at in (first, second)] == [[[1], [2]], [[3], [6]]]


def test_last_rows_of_the_cache_move_into_free_places() -> None:
    cache, stored = Cache(tokens=15), torch.arange(5.0).view(5, 1, 1, 1)
    cache.shape(places=5, slots=3)
    for _ in cache.turns(ids(0, 1), [[1], [1], [1], [1, 1], [1]]):
        cache.append(0, stored.expand(-1, -1, 2, -1), -stored.expand(-1, -1, 2, -1))
    assert cache.keep([1, 3, 4]) == [4, 1, 3]
    assert cache.used == [1, 1, 2]
    keys, values = cache.buffers[0]
    equal(keys[:3, 0, 0, 0], torch.tensor([4.0, 1.0, 3.0]))
    equal(keys, -values)
    assert cache.keep([]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_qkv": "shared"},
        {"lora_targets": ("attn.c_proj", "mlp.c_fc")},
        {"lora_targets": LORA_TARGETS, "lora_qkv": "shared"},
    ],
    ids=["shared", "two targets", "all shared"],
)
def test_shared_prefix_and_one_a_equal_the_plain_padded_computation(
    changes: dict[str, Any]
) -> None:
    model = mark_only_lora_as_trainable(make(**ADAPTERS | changes))
    prefix, idx = ids(1, 8), ids(3, 7)
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
    """The position after the first token says end-of-text, later ones do not."""
    out = make_ending().generate(torch.tensor([[6, 7], [5, 8]]), 4, temperature=0)
    equal(out, torch.tensor([[6, 7, 3, 3, 3, 3], [5, 8, 3, 3, 3, 3]]))
    steps = list(make_ending().stream([[5], [6, 7]], 4, temperature=0))
    assert [step.rows for step in steps] == [[1, 0], [1], [1], [1]]
    equal(join_tokens(steps), torch.tensor([[END_OF_TEXT, -1, -1, -1], [3] * 4]))


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


@pytest.mark.parametrize(("qkv", "groups"), [("split", 3), ("shared", 1)])
def test_only_the_fused_projection_is_grouped(qkv: str, groups: int) -> None:
    model = GPT(replace(TINY, **ADAPTERS, lora_targets=LORA_TARGETS, lora_qkv=qkv))
    for name, layer in lora_layers(model).items():
        expected = groups if name.endswith("c_attn") else 1
        assert (layer.lora_groups, layer.lora_A.size(0)) == (expected, 4 * expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ("c_attn", "lm_head")}, "unknown lm_head; allowed are qkv, .*, c_attn, "),
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


def test_sizes_are_the_published_ones() -> None:
    millions = {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}
    with torch.device("meta"):
        counts = {name: count_parameters(GPT(shape)).total for name, shape in SIZES.items()}
    assert {name: round(count / 1e6) for name, count in counts.items()} == millions


def test_no_prompts_give_no_tokens(tiny: GPT) -> None:
    assert tiny.generate(torch.empty(0, 3, dtype=torch.long), 4).shape == (0, 3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_logits_are_contiguous(tiny: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of so few rows, computed transposed, are not."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    idx = targets = ids(1, 7)
    with torch.no_grad():
        assert not tiny._head(torch.randn(6, TINY.n_embd)).is_contiguous()
        assert tiny(idx)[0].is_contiguous()
        assert tiny(idx, targets)[0].is_contiguous()


def test_whoever_changes_a_step_changes_no_later_one(tiny: GPT) -> None:
    prompts = [[1, 2], [3], [4, 4, 4]]

    def steps(change: bool) -> Iterator[tuple[list[int], list[list[int]]]]:
        for step in tiny.stream(prompts, [3, 5, 2], temperature=0, batch_size=2):
            yield [*step.rows], step.tokens.tolist()
            if change:
                step.rows.clear()
                step.tokens.zero_()

    assert list(steps(change=True)) == list(steps(change=False))
