"""Turn movie reviews into a stream of tokens for pretraining.

Unlabelled reviews stay whole. Labelled ones are split into pieces of a few sentences. A verdict in
ordinary words, as on web sites but never in the form of our prompts, follows each piece.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoints.layouts import END_OF_TEXT
from models.tokenizer import get_tokenizer
from runtime.batching import epoch_order
from tasks.sources import Record, label_text, read_records, show_row

SPLITS = ("train", "test", "unsupervised")  # those of stanfordnlp/imdb on the hub
# Questions about the verdict, with the answers for labels 0 and 1; their first tokens differ.
VERDICTS = (
    ("\nVerdict:", (" bad", " good")),
    ("\nRating:", (" 2/10", " 9/10")),
    ("\nRecommended:", (" no", " yes")),
    ("\nIn a word:", (" awful", " great")),
)
LINE_BREAK = re.compile(r"<br\s*/?>")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PUNCTUATION = re.compile(r'([.,!?;:"()])')
SHORTEST_PIECE = 8  # words; shorter pieces seldom express an opinion
CHUNK = 20_000  # documents per call of the tokenizer


class Document(NamedTuple):
    """A text, optionally followed by a question about its verdict and the answer."""

    text: str
    question: str = ""
    answer: str = ""


def read_reviews(data: str) -> tuple[list[Record], list[Record]]:
    """Return the reviews to train on, and every hundredth as the held-out set.

    They come from all splits, each text once, sorted by text. Raises ValueError for another source,
    for a row without a text, or with a label other than 0, 1 and -1 (none), and for fewer than two
    texts; OSError for files that are missing or unreachable.
    """
    if data != "imdb" and not (data and Path(data).is_dir()):
        raise ValueError(f"data={data!r} must be imdb (from the hub) or a folder with "
                         f"{{{','.join(SPLITS)}}}.parquet, .jsonl or .csv")
    found: dict[str, int] = {}
    for split in SPLITS:
        for row, record in enumerate(read_records(data, split), 1):
            fields = record if isinstance(record, dict) else {}
            text, label = fields.get("text"), label_text(fields.get("label"))
            if not isinstance(text, str) or label not in ("0", "1", "-1"):
                raise ValueError(f"{data}: {split} row {row} needs a text and a label of 0, 1 or "
                                 f"-1 (none), but is {show_row(record)}")
            found[text] = int(label)
    reviews = [{"text": text, "label": found[text]} for text in sorted(found)]
    if len(reviews) < 2:
        raise ValueError(f"{data} needs two different texts or more: one is held out")
    held_out = reviews[::100]
    del reviews[::100]
    return reviews, held_out


def spaced(text: str) -> str:
    """Lower-case `text` and put spaces around its punctuation, as in old review corpora."""
    return " ".join(PUNCTUATION.sub(r" \1 ", text.lower()).split())


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Split a review into pieces of one to three sentences, more if they are very short."""
    sentences = SENTENCE_END.split(text)
    while sentences:
        size = rng.choice((1, 1, 2, 3))
        while size < len(sentences) and len(" ".join(sentences[:size]).split()) < SHORTEST_PIECE:
            size += 1
        yield " ".join(sentences[:size])
        sentences = sentences[size:]


def documents(reviews: Sequence[Record], passes: int, seed: int) -> list[Document]:
    """Return the corpus in random order: whole unlabelled reviews, and pieces of labelled ones.

    Each labelled review is split `passes` times, at different places. Half of the whole reviews
    and three quarters of the pieces are `spaced`.
    """
    rng = random.Random(f"corpus {seed}")
    corpus = []
    for review in reviews:
        text = " ".join(LINE_BREAK.sub(" ", review["text"]).split())
        if review["label"] == -1:
            corpus.append(Document(spaced(text) if rng.random() < 0.5 else text))
            continue
        for _ in range(passes):
            for piece in pieces(text, rng):
                question, answers = rng.choice(VERDICTS)
                piece = spaced(piece) if rng.random() < 0.75 else piece
                corpus.append(Document(piece, question, answers[review["label"]]))
    rng.shuffle(corpus)  # adjacent pieces of one review would leak its verdict
    return corpus


def tokenize(corpus: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Return the stream of token ids (N,), uint16, each document ended by end-of-text.

    The second array (N,) marks the first token of each verdict.
    """
    tokenizer = get_tokenizer()
    encode = lru_cache(tokenizer.encode_ordinary)
    tokens, verdicts = [], []
    for start in range(0, len(corpus), CHUNK):
        ids: list[int] = []
        answers = []
        chunk = corpus[start : start + CHUNK]
        texts = tokenizer.encode_ordinary_batch([document.text for document in chunk])
        for document, text in zip(chunk, texts, strict=True):
            ids += text + encode(document.question)
            answers += [len(ids)] if document.answer else []
            ids += [*encode(document.answer), END_OF_TEXT]
        tokens.append(np.array(ids, dtype=np.uint16))
        verdicts.append(np.zeros(len(ids), dtype=bool))
        verdicts[-1][answers] = True
    return np.concatenate(tokens), np.concatenate(verdicts)


class Windows:
    """Rows of `length` + 1 tokens from a stream; a batch depends only on seed and iteration."""

    def __init__(self, stream: tuple[np.ndarray, np.ndarray], length: int, seed: int) -> None:
        (self.tokens, self.verdicts), self.length, self.seed = stream, length, seed
        self.count = (len(self.tokens) - 1) // length
        if self.count < 1:
            raise ValueError(f"{len(self.tokens)} tokens of text do not fill a row of {length}")

    def batch(self, iteration: int, size: int) -> tuple[Tensor, Tensor]:
        """Return rows of tokens (B, T+1) and the marks of the verdicts in the last T, (B, T)."""
        wanted = (divmod(i, self.count) for i in range(iteration * size, (iteration + 1) * size))
        return self.take([epoch_order(self.count, self.seed, epoch)[i] for epoch, i in wanted])

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the given rows, in the shapes of `batch`."""
        index = np.array(rows)[:, None] * self.length + np.arange(self.length + 1)  # (B, T+1)
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return tokens, torch.from_numpy(self.verdicts[index[:, 1:]])
