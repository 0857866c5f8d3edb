"""The estimate of a step's memory is what the step allocates."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from bench.memory_estimate import (
    PAIRS_PRESET,
    PRESETS,
    BatchShape,
    Estimate,
    PairsConfig,
    bytes_of,
    estimate,
    estimate_presets,
    fused_attend,
    largest_batch,
    pairs_batch,
    preset_path,
)
from bench.report import markdown, plot
from bench.rivals import Ours
from configurator import configure
from dataloader import Batch
from model import GPT, GPTConfig
from runtime.attention import attend
from train import TrainConfig, train_step

SHAPE = GPTConfig(block_size=256, n_layer=5, n_head=4, n_embd=64)
CPU = torch.device("cpu")


def allocated(action: Callable[[], object]) -> int:
    """Return the peak of the bytes that torch's allocator has given out during an action."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in memory))


def shape_of(batch: Batch) -> BatchShape:
    supervised = (batch.targets >= 0).sum(dim=1)
    return BatchShape(*batch.inputs.shape, batch.prefix.size(1), int(supervised.max()))


@pytest.mark.parametrize(("rank", "dtype"), [(16, "float16"), (0, "bfloat16")])
def test_estimate_is_within_15_percent_of_a_real_step(
    config: TrainConfig, tmp_path: Path, rank: int, dtype: str
) -> None:
    GPT(SHAPE).save_pretrained(tmp_path)
    ours = Ours(str(tmp_path), replace(config, lora_rank=rank, dtype=dtype), CPU)
    records = [{"text": "indeed " * (170 + i % 5), "label": i % 2} for i in range(12)]
    batches = ours.loader.batches(records, 12)

    def step() -> None:
        train_step(ours.model, batches, ours.optimizer, ours.scaler, 1.0, ours.dtype)

    step()  # makes the optimizer's moments
    shape = replace(SHAPE, lora_rank=rank, lora_alpha=8.0, lora_dropout=0.1)
    found = estimate(shape, shape_of(batches[0]), ours.dtype)
    assert found.activations == pytest.approx(allocated(step), rel=0.15)
    weights = list(ours.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    assert found.frozen + found.trained == bytes_of(weights)
    assert found.trained == found.gradients == bytes_of([weight.grad for weight in trained])
    moments = [value for state in ours.optimizer.state.values()
               for name, value in state.items() if name != "step"]
    assert found.optimizer == bytes_of(moments)
    assert found.total == sum(found) - found.logits


def test_attention_as_on_a_gpu_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)  # (B, H, T, D)
    prefix = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    for given in (prefix, None):
        assert_close(fused_attend(q, k, v, given, None), attend(q, k, v, given, None))
    mask = torch.rand(2, 1, 1, 5) > 0.5
    assert_close(fused_attend(q[:, :, :1], k, v, prefix, mask),
                 attend(q[:, :, :1], k, v, prefix, mask))


def test_attention_weights_are_not_kept_on_a_gpu() -> None:
    shape = replace(SHAPE, n_layer=2, lora_rank=1, dropout=0.1)
    batch = BatchShape(rows=4, tokens=100, prefix=40, supervised=1)
    plain, on_gpu = (estimate(shape, batch, torch.float16, gpu) for gpu in (False, True))
    weights = 4 * 4 * 100 * 140  # rows, heads, tokens, keys: of one layer, the last one is short
    assert plain.activations - on_gpu.activations > 4 * weights  # bytes of float32
    assert plain[:4] == on_gpu[:4]


def test_largest_batch_is_the_one_with_the_most_tokens(config: TrainConfig, reviews: str) -> None:
    config = replace(config, init_from="gpt2", dataset=reviews)
    found = largest_batch(config)
    assert (found.supervised, found.prefix > 10) == (2, True)
    assert found.rows * found.tokens >= config.batch_size * 5


def test_pairs_fill_their_sequences() -> None:
    config = configure(PairsConfig, [preset_path(PAIRS_PRESET)])
    assert pairs_batch(config) == BatchShape(rows=32, tokens=63, prefix=0, supervised=49)


def test_every_preset_is_estimated_and_reported(
    reviews: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Estimate(4 * 10**9, 10**9, 10**9, 2 * 10**9, 3 * 10**9, 10**8)
    shapes = []
    monkeypatch.setattr(
        "bench.memory_estimate.estimate", lambda shape, *_, **__: shapes.append(shape) or one)
    found = estimate_presets(reviews)
    assert list(found) == [*PRESETS, PAIRS_PRESET]
    assert [shape.lora_rank for shape in shapes] == [16, 128, 196, 0, 16]
    assert [shape.n_layer for shape in shapes] == [24, 24, 24, 24, 36]
    report = {"memory": found, "machine": {}, "command": ""}
    assert "| lora_r16 | 4.00 | 1.00 | 1.00 | 2.00 | 3.00 | 0.10 | 11.00 |" in markdown(report)
    (panel,) = plot(report).axes
    assert [bar.get_width() for bar in panel.patches] == [11.0] * 5
