"""The benchmark measures every contender and writes its report."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_workers import InProcess
from matplotlib.image import imread

from bench.__main__ import main
from bench.costs import grow, growth
from bench.report import check_folder, markdown, plot
from bench.settings import BenchConfig
from bench.worker import random_checkpoint, sized_reviews
from configurator import configure
from model import GPT, GPTConfig
from models.tokenizer import get_tokenizer

ROOT = Path(__file__).parents[2]
RATIOS = {f"{verb}.{rival}.{dtype}" for verb in ("train", "score")
          for rival in ("handout", "peft") for dtype in ("float32", "bfloat16")}


@pytest.fixture
def config(reviews: str, tmp_path: Path) -> BenchConfig:
    return BenchConfig(
        model="gpt2-mini", what="train,score", lora_rank=4, batch_size=8, rounds=1, device="cpu",
        dtype="bfloat16", dataset=reviews, out_dir=str(tmp_path))


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    check_folder(tmp_path)
    (tmp_path / "bench.json").write_text('{"machine": {}}')
    (tmp_path / "bench.png").write_bytes(b"ours")
    check_folder(tmp_path)
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a bench\.json that this program did not write"):
        check_folder(tmp_path)


def test_rank_that_no_model_has_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank='20000' must be at most 10000"):
        configure(BenchConfig, ["lora_rank=20000"])


def test_benchmark_runs_every_contender_and_writes_its_report(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.turns.Worker", InProcess)
    main(replace(config, window=16))
    report = json.loads(Path(config.out_dir, "bench.json").read_text())
    assert report["ratios"].keys() == RATIOS
    assert report["memory_ratios"].keys() == RATIOS
    for key, ratio in report["ratios"].items():
        low, high = report["spreads"][key]
        assert 0 < low <= ratio <= high
    rows = report["contenders"]
    assert list(rows) == ["ours.float32", "ours.bfloat16", "full.float32", "handout.float32",
                          "peft.float32"]
    for row in rows.values():
        assert row["train_reviews_per_second"] > 0
        assert row["train_memory_mib"] > 100
        assert row["train_seconds_to_first"] > 0
        assert 0 < row["train_share_of_best_peak"] <= row["train_share_of_plain_peak"]
    adapters = 4 * 12 * (256 + 768) * 4  # layers; A (12, 256), block-diagonal B (768, 12); bytes
    assert adapters < rows["ours.float32"]["checkpoint_bytes"] < adapters + 10_000
    weights = 4 * sum(p.numel() for p in GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256)).
                      parameters())
    assert weights < rows["handout.float32"]["checkpoint_bytes"] < 1.05 * weights
    table = Path(config.out_dir, "bench.md").read_text()
    assert all(name in table for name in [*rows, *RATIOS])
    assert imread(Path(config.out_dir, "bench.png")).shape == (840, 1200, 4)
    panels = plot(report).axes
    assert [panel.get_title() for panel in panels] == ["train", "score"]
    for panel in panels:
        assert panel.get_xlabel() == "reviews a second"
        assert [label.get_text() for label in panel.get_yticklabels()] == list(rows)
        widths = [bar.get_width() for bar in panel.patches]
        assert widths == [row[f"{panel.get_title()}_reviews_per_second"] for row in rows.values()]


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_checkpoint_of_another_family_is_compared(
    config: BenchConfig, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.turns.Worker", InProcess)
    main(replace(config, model=llama, dtype="float32"))
    report = json.loads(Path(config.out_dir, "bench.json").read_text())
    assert report["ratios"].keys() == {key for key in RATIOS if key.endswith("float32")}
    rows = report["contenders"]
    adapters = 2 * 4 * 4 * (3 * 16 + 24 + 12 + 12)  # layers; bytes; rank; in and out of q, k, v
    for name in ("ours.float32", "peft.float32"):
        assert adapters < rows[name]["checkpoint_bytes"] < adapters + 10_000
    assert all(row["score_gflops"] > 0 and row["train_gflops"] > 0 for row in rows.values())


def measure_alone(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Return what a part that needs no rivals measures, in this process."""
    monkeypatch.setattr("bench.turns.Worker", InProcess)
    main(replace(config, dtype="float32", window=8))
    return json.loads(Path(config.out_dir, "bench.json").read_text())[config.what]


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_methods_that_the_model_can_have_are_measured(
    config: BenchConfig, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_alone(replace(config, model=llama, what="methods"), monkeypatch)
    assert list(found) == ["lora", "bottleneck", "prefix", "full"]  # it has no biases
    assert all(value > 0 for point in found.values() for value in point.values())
    assert "| bottleneck | " in Path(config.out_dir, "bench.md").read_text()


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_examples_in_the_prompt_are_measured_beside_none(
    config: BenchConfig, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(config, model=llama, what="shots", prompt="{text} =")
    found = measure_alone(asked, monkeypatch)
    assert list(found) == ["0", "4", "16"]
    assert found["0"]["times_zero_shot"] == 1
    assert all(value > 0 for point in found.values() for value in point.values())
    assert "| 16 | " in Path(config.out_dir, "bench.md").read_text()


@pytest.mark.usefixtures("_gpt2_tokenizer")
def test_growth_of_a_checkpoint_has_no_other_sizes_and_no_longer_reviews(
    config: BenchConfig, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.costs.grow", lambda *_: {"train_ms": 3.0})
    found = growth(replace(config, model=llama))
    assert list(found) == ["batch_size", "review_tokens", "lora_rank"]
    assert list(found["review_tokens"]) == ["10", "30", "100"]  # of 256 positions


def test_model_that_is_nowhere_is_one_line_and_exit_code_2(config: BenchConfig) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "what=train", "model=./nowhere", "device=cpu",
         f"out_dir={config.out_dir}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("what", ["", "speed", "train,speed"])
def test_unknown_parts_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match="must list one or more of train, score, generate,"):
        main(BenchConfig(what=what))


@pytest.mark.parametrize("what", ["train", "score", "growth,score", "generate"])
def test_comparison_without_rivals_names_them_and_the_command_that_installs_them(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("bench.settings.find_spec", lambda name: None)
    message = r"need transformers and peft: pip install -r requirements-dev\.txt"
    with pytest.raises(ValueError, match=message):
        main(replace(config, what=what))
    assert not Path(config.out_dir, "bench.json").exists()


def test_importing_the_benchmark_does_not_import_the_rivals() -> None:
    code = """if True:
        import sys
        sys.modules |= {"transformers": None, "peft": None}  # importing them would raise
        import bench.__main__
        bench.__main__.run_script(bench.__main__.main, bench.__main__.BenchConfig)
    """
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parts to measure: train, score, generate, methods, shots, growth, memory" in done.stdout


def test_sized_reviews_have_about_the_requested_tokens() -> None:
    records = [{"text": "a quick brown fox jumps over the lazy dog ."}] * 50
    tokenizer = get_tokenizer()
    for record in sized_reviews(30, 8, records, tokenizer):
        assert 28 <= len(tokenizer.encode_ordinary(record["text"])) <= 32


def test_growth_is_measured_along_every_axis_without_rivals(
    config: BenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each point changes exactly one setting; the measurement itself is tested below."""
    points = []

    def note(config: BenchConfig, tokens: int, number: int, folder: str) -> dict[str, float]:
        points.append((config.batch_size, tokens, config.lora_rank, config.model, number))
        return {"train_ms": 3.0, "score_ms": 1.0, "train_mib": 900.0, "score_mib": 800.0}

    monkeypatch.setattr("bench.costs.grow", note)
    monkeypatch.setattr("bench.settings.find_spec", lambda name: None)
    monkeypatch.setattr(
        "bench.settings.random_checkpoint", lambda *_: contextlib.nullcontext("folder"))
    monkeypatch.setattr("bench.rivals.load_config", lambda folder: GPTConfig())
    monkeypatch.setattr("bench.rivals.load_tokenizer", lambda folder: get_tokenizer())
    main(replace(config, what="growth"))
    assert points[:5] == [(size, 0, 4, "gpt2-mini", 128) for size in (1, 4, 16, 64, 128)]
    assert points[5:10] == [(8, n, 4, "gpt2-mini", 8) for n in (10, 30, 100, 250, 500)]
    assert points[10:16] == [(8, 0, r, "gpt2-mini", 8) for r in (4, 16, 64, 128, 256, 512)]
    assert points[16:] == [(8, 0, 4, size, 8) for size in ("gpt2-mini", "gpt2", "gpt2-medium")]
    report = json.loads(Path(config.out_dir, "bench.json").read_text())
    assert list(report["growth"]) == ["batch_size", "review_tokens", "lora_rank", "model"]
    assert "| gpt2-medium | 3.0 | 1.0 | 900.0 | 800.0 |" in markdown(report)
    panels = plot(report).axes
    assert [panel.get_xlabel() for panel in panels] == [
        axis.replace("_", " ") for axis in report["growth"]]
    for panel, measured in zip(panels, report["growth"].values(), strict=True):
        assert {line.get_label(): (list(line.get_xdata()), set(line.get_ydata()))
                for line in panel.lines} == {
            "train": (list(measured), {3.0}), "score": (list(measured), {1.0})}


def test_one_point_of_growth_is_a_measurement(config: BenchConfig) -> None:
    with random_checkpoint("gpt2-mini", seed=0) as folder:
        short, long = (grow(config, tokens, 4, folder) for tokens in (10, 400))
    assert short.keys() == {"train_ms", "score_ms", "train_mib", "score_mib"}
    assert all(value > 0 for value in short.values())
    assert short["train_mib"] < long["train_mib"]
