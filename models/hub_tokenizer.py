"""The tokenizer that a checkpoint of the hub brings with it."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints.files import write_json
from models.chat_template import render

NO_CHAT = "this model has no chat template; prompt=chat needs an instruct model"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a chat template may use
REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are written as
    the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return ({chr(byte): byte for byte in printable}
            | {chr(0x100 + i): byte for i, byte in enumerate(others)})


BYTE_OF = _byte_characters()


class HubTokenizer:
    """Encode and decode as the hub's `tokenizer.json` says, with what `dataloader.py` needs.

    `config` holds tokenizer_config.json; `chat_template`, if given, replaces the one in it.
    `n_vocab` is one more than the highest id, `eot_token` the id that ends an answer, and `start`
    the ids that the model wants before every text.
    Raises ValueError for contents that the library refuses, or without an end-of-text token.
    """

    def __init__(
        self, tokenizer_json: dict[str, Any], config: dict[str, Any], chat_template: str = ""
    ) -> None:
        self._contents, self._config = json.dumps(tokenizer_json), config  # much less as text
        self._names = {key: name for key in NAMED if (name := _token_text(config.get(key)))}
        self._plain = _build(tokenizer_json, self._names.values())
        unprefixed = _without_prefix(tokenizer_json)
        same = unprefixed == tokenizer_json
        self._continuing = self._plain if same else _build(unprefixed, self._names.values())
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocabulary.values(), default=-1) + 1
        eot = vocabulary.get(self._names.get("eos_token", ""))
        if eot is None:
            raise ValueError("tokenizer_config.json must name an eos_token of the vocabulary, not "
                             f"{config.get('eos_token')!r:.80}")
        self.eot_token: int = eot
        self._added = self._plain.get_added_tokens_decoder()
        self._special = {token.content: (i, token) for i, token in self._added.items()
                         if token.special and token.content}
        self._byte_level = '"ByteLevel"' in json.dumps(tokenizer_json.get("decoder"))
        # Metaspace has this word where only the first part of a text begins with a space.
        self._first_only = '"first"' in json.dumps(tokenizer_json.get("pre_tokenizer"))
        self.start = self._find_start()
        self._chat_template = chat_template or _default_template(config.get("chat_template"))

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the token ids of plain text, without `start`.

        A special token spelled out in it stays plain text.
        """
        return _encode(self._plain, text)

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of plain text that continues another one.

        No space is put before it, as some tokenizers do at the beginning of a text.
        """
        return _encode(self._continuing, text)

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """Return the text of `ids`, in which special tokens stand by their names.

        `errors` says what becomes of bytes that are no UTF-8, as in `bytes.decode`.
        """
        if self._byte_level:
            return b"".join(map(self._token_bytes, ids)).decode("utf-8", errors)
        text = self._plain.decode(list(ids), skip_special_tokens=False)
        return text.rstrip(REPLACEMENT) if errors == "ignore" else text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(ids) for ids in batch]

    @property
    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of all that decides the ids of a prompt, as a fact of a run."""
        others = json.dumps([self._names, self._chat_template])
        parts = f"[{self._contents}, {others[1:]}"
        return {"tokenizer_sha256": hashlib.sha256(parts.encode()).hexdigest()}

    @property
    def has_chat(self) -> bool:
        return bool(self._chat_template)

    def encode_chat(self, *messages: str) -> list[int]:
        """Return the ids of the chat template with `messages`, up to where the answer begins.

        They are the user's and the assistant's in turn, the user's last. Special tokens are those
        of the template; spelled out in a message they stay plain text.
        Raises ValueError if the model has no chat template, or if it fails.
        """
        if not self.has_chat:
            raise ValueError(NO_CHAT)
        special = sorted(self._special, key=len, reverse=True)
        hidden, restored = _hide(messages, special)
        parts = self._split(render(self._chat_template, hidden, self._names), special)
        return [i for part in parts for i in self._encode_part(part, restored)]

    def save_pretrained(self, folder: Path, max_length: int) -> None:
        """Write the tokenizer to `folder` for transformers' AutoTokenizer.

        `max_length` is the model's, in tokens. Raises OSError if it cannot be written.
        """
        config = self._names | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
            "clean_up_tokenization_spaces": False}
        if self.has_chat:
            config["chat_template"] = self._chat_template
        write_json(folder / "tokenizer.json", json.loads(self._contents))
        write_json(folder / "tokenizer_config.json", config)

    def _find_start(self) -> tuple[int, ...]:
        with _refusing_damage():
            found = self._plain.encode("a")  # the mask is 1 for what the post-processor adds
        marks = zip(found.ids, found.special_tokens_mask, strict=True)
        return tuple(i for i, _ in takewhile(lambda mark: mark[1], marks))

    def _token_bytes(self, i: int) -> bytes:
        token = self._plain.id_to_token(i) or ""
        if i not in self._added and BYTE_OF.keys() >= set(token):
            return bytes(map(BYTE_OF.__getitem__, token))
        return token.encode()

    def _split(self, rendered: str, special: list[str]) -> Iterator[tuple[str, bool, bool]]:
        """Yield the parts of a chat: text, whether it is a special token, whether it is the first.

        White space beside a special token belongs to it if its definition says so.
        """
        if not special:
            yield rendered, False, True
            return
        tokens = [self._special[name][1] for name in special]
        before = r"(?:(?<!\s)\s*)?"  # a search begins once in a white space, not at each character
        pattern = "|".join(
            (before if token.lstrip else "") + f"({re.escape(token.content)})"
            + (r"\s*" if token.rstrip else "") for token in tokens)
        end = 0
        for found in re.finditer(pattern, rendered):
            yield rendered[end : found.start()], False, end == 0
            yield found[found.lastindex], True, False
            end = found.end()
        yield rendered[end:], False, end == 0

    def _encode_part(self, part: tuple[str, bool, bool], restored: dict[str, str]) -> list[int]:
        text, is_special, is_first = part
        if is_special:
            return [self._special[text][0]]
        for mark, name in restored.items():
            text = text.replace(mark, name)
        tokenizer = self._plain if is_first or not self._first_only else self._continuing
        return _encode(tokenizer, text)


def _build(contents: dict[str, Any], special: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of whole, unpadded, plain texts; `special` names more special tokens."""
    _refuse_prefix(contents.get("model"))
    with _refusing_damage():
        tokenizer = Tokenizer.from_str(json.dumps(contents))
    added = tokenizer.get_added_tokens_decoder().values()
    known = {token.content for token in added if token.special}  # with white space of their own
    tokenizer.add_special_tokens([
        name for name in special if name not in known and tokenizer.token_to_id(name) is not None])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _refuse_prefix(model: Any) -> None:
    """Refuse merges of prefixed parts: if one lacks its prefix, the library ends the process."""
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if prefix and model.get("merges"):
        raise ValueError(f"tokenizer.json: continuing_subword_prefix={prefix!r:.80} must be null")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
    with _refusing_damage():
        return tokenizer.encode(text, add_special_tokens=False).ids


@contextmanager
def _refusing_damage() -> Iterator[None]:
    """Turn what the library raises into a ValueError; it raises nothing specific, or panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer.json is damaged or not supported: {reason}") from None


def _without_prefix(part: Any) -> Any:
    """Return the contents of tokenizer.json without what puts a space before a text.

    The part that decodes is left alone: it removes that space, and nothing reads it here.
    """
    if isinstance(part, list):
        return [_without_prefix(item) for item in part if not _is_prepend(item)]
    if not isinstance(part, dict):
        return part
    changed = {}
    for key, value in part.items():
        if key in ("model", "decoder", "added_tokens", "post_processor"):
            changed[key] = value
        elif key == "prepend_scheme":
            changed[key] = "never"
        elif key == "add_prefix_space":
            changed[key] = False
        else:
            changed[key] = None if _is_prepend(value) else _without_prefix(value)
    return changed


def _is_prepend(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


def _token_text(token: Any) -> str:
    """Return the text of a token that a config gives as such, or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _default_template(template: Any) -> str:
    """Return a config's chat template; older ones list several by name."""
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template
                         if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return template if isinstance(template, str) else ""


def _hide(messages: Sequence[str], special: list[str]) -> tuple[list[str], dict[str, str]]:
    """Replace the special tokens in `messages` by marks; return both, with what each stands for.

    A mark is made of private characters that the messages do not have.
    """
    text = "".join(messages)
    fresh = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    marks = {name: next(fresh) for name in special if any(name in said for said in messages)}
    if not marks:
        return list(messages), {}
    pattern = "|".join(map(re.escape, marks))  # the longest name first
    hidden = [re.sub(pattern, lambda found: marks[found[0]], said) for said in messages]
    return hidden, {mark: name for name, mark in marks.items()}
