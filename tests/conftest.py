"""What the tests share: tiny random models in the hub's layout, and no way out to the network."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # set before huggingface_hub is imported; one test undoes it
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models a second thread only waits
os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch loads: tests share the cores

import pytest
import torch
from made_families import CONFIGS, Family, make_family
from made_models import NEGATIVE, POSITIVE, TINY, noisy, shaken
from made_tokenizers import CONFIG, byte_level, make_llama

from checkpoints.files import write_json
from model import GPT, GPTConfig
from train import TrainConfig, train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest test first: at the end, one process would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> GPT:
    """A random GPT-2 without adapters, 2 layers, 32 wide, 101 tokens."""
    return GPT(TINY)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random GPT-2 of the real vocabulary, 16 wide, in the hub's layout."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random instruct model of the Llama family and its tokenizer."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("llama")
    make_llama(max_position_embeddings=512, eos_token_id=2).save_pretrained(folder)
    write_json(folder / "tokenizer.json", byte_level())
    write_json(folder / "tokenizer_config.json", CONFIG)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny checkpoint of each family of decoders."""
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder data set of 48, 12 and 12 short reviews."""
    folder = tmp_path_factory.mktemp("reviews")
    words = {0: ("dull", "tedious", "lifeless"), 1: ("moving", "witty", "gorgeous")}
    for split, rows in (("train", 48), ("validation", 12), ("test", 12)):
        lines = [
            {"text": f"{split} film {i} is {words[i % 2][i % 3]}" + " indeed" * (i % 5),
             "label": i % 2}
            for i in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 24, 8 and 8 pairs with answers of many lengths, some of them cut off."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, number in (("train", 24), ("validation", 8), ("test", 8)):
        lines = [{"prompt": f"{split} film {i} is", "chosen": " witty" * (1 + i % 4) + ".",
                  "rejected": " dull" * (1 + i % 3), "rejected_ended": i % 2 == 0}
                 for i in range(number)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def imdb(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the schema of stanfordnlp/imdb: 400 reviews of five sentences."""
    folder, rng = tmp_path_factory.mktemp("imdb"), random.Random(0)
    lexicon = {0: "dull tedious lifeless stale clumsy", 1: "moving witty gorgeous lively clever"}

    def review(label: int) -> dict:
        words = lexicon[label if label >= 0 else rng.randrange(2)].split()
        return {"label": label, "text": " ".join(
            f"The {rng.choice(('cast', 'plot', 'score'))} of this film is {rng.choice(words)} "
            f"and {rng.choice(words)}." for _ in range(5))}

    for split, labels in (("train", (0, 1)), ("test", (0, 1)), ("unsupervised", (-1,))):
        lines = "\n".join(json.dumps(review(label)) for label in labels for _ in range(100))
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    return str(folder)


@pytest.fixture
def config(checkpoint: str, reviews: str, tmp_path: Path) -> TrainConfig:
    """Eight steps of eight reviews, validated every third."""
    return TrainConfig(
        init_from=checkpoint, dataset=reviews, out_dir=str(tmp_path / "run"), device="cpu",
        dtype="float32", lora_rank=4, lora_alpha=8.0, lora_dropout=0.1, learning_rate=1e-2,
        batch_size=4, gradient_accumulation_steps=2, max_iters=8, eval_interval=3,
        wandb_mode="disabled",
    )


@pytest.fixture(scope="session")
def trained(reviews: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, `lora` and `bitfit`, after which labels are likely."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("trained")
    base = noisy(GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=16)))
    with torch.no_grad():
        label, difference = torch.randn(2, 16)
        base.transformer.wte.weight[[POSITIVE, NEGATIVE]] = torch.stack(
            (2 * label + 0.3 * difference, 2 * label - 0.3 * difference))
    base.save_pretrained(folder / "base")
    config = TrainConfig(
        init_from=str(folder / "base"), dataset=reviews, device="cpu", dtype="float32", lora_rank=2,
        lora_alpha=8.0, batch_size=8, max_iters=4, eval_interval=2, learning_rate=0.02,
        wandb_mode="disabled")
    for method in ("bitfit", "lora"):
        train(replace(config, method=method, out_dir=str(folder / method)))
    return folder


@pytest.fixture
def model() -> GPT:
    """A random GPT-2 of the real vocabulary, with adapters, whose answers depend on the text."""
    torch.manual_seed(1)
    return shaken(GPT(GPTConfig(
        block_size=128, n_layer=2, n_head=2, n_embd=16, lora_rank=2, lora_alpha=3.0
    )))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Forty questions with short answers, and one with a long one."""
    rows = [{"instruction": f"Print {i}", "input": "" if i % 2 else "a number",
             "output": f"```python\nprint({i})\n```", "text": f"SECRET print({i})"}
            for i in range(40)]
    rows[7]["output"] = "```python\n" + "\n".join(f"x{i} = {i}" for i in range(99)) + "\n```"
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)
