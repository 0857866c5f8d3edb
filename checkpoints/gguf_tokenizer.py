"""The tokenizer in a GGUF file, as the tokenizer.json and tokenizer_config.json of the hub."""

from pathlib import Path
from typing import Any

import gguf

from checkpoints.gguf_format import INTEGERS, GGUFFields

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
# How a text is split into words, by tokenizer.ggml.pre; the last two are the patterns that Meta and
# Alibaba published with Llama 3 and Qwen2.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
         r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"llama-bpe": WORDS.format(digits="{1,3}"), "qwen2": WORDS.format(digits="")}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "gpt-2": [BYTES],
} | {name: [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}, BYTES | {"use_regex": False}] for name, pattern in SPLITS.items()}


def read_gguf_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of the tokenizer.json and tokenizer_config.json that equal a GGUF file's.

    Raises ValueError for a damaged file, and for a tokenizer that is not byte-level BPE or splits
    words in an unknown way.
    """
    model = GGUFFields(path)
    kind = model.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer.ggml.model={kind!r:.80} must be 'gpt2'; load the model"
                         " from the hub's layout, with its tokenizer.json")
    pre = model.text("tokenizer.ggml.pre", "")  # older files do not say how they split words
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: tokenizer.ggml.pre={pre!r:.80} must be one of "
                         f"{', '.join(PRE_TOKENIZERS)}; load the model from the hub's layout, with "
                         "its tokenizer.json")
    tokens = model.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens has a token twice")
    config = _tokenizer_config(model, tokens)
    adds_bos = model.optional(
        "tokenizer.ggml.add_bos_token", {gguf.GGUFValueType.BOOL}, pre == "llama-bpe")
    if adds_bos and "bos_token" not in config:
        raise ValueError(f"{path}: it adds a bos token, but has no tokenizer.ggml.bos_token_id")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": _added_tokens(model, tokens),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _begin_with(config["bos_token"], tokens) if adds_bos else None,
        "decoder": BYTES,
        "model": {
            "type": "BPE", "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": _merges(model)},
    }, config


def _tokenizer_config(model: GGUFFields, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"model_max_length": model.whole("context_length")}
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        name = f"tokenizer.ggml.{theirs}_token_id"
        token = model.optional(name, INTEGERS)
        if token is not None and not 0 <= token < len(tokens):
            raise ValueError(f"{model.path}: {name}={token}, but there are {len(tokens)} tokens")
        if token is not None:
            config[f"{ours}_token"] = tokens[token]
    if template := model.text("tokenizer.chat_template", ""):
        config["chat_template"] = template
    return config


def _added_tokens(model: GGUFFields, tokens: list[str]) -> list[dict[str, Any]]:
    name, kinds = "tokenizer.ggml.token_type", {gguf.GGUFValueType.ARRAY, *INTEGERS}
    types = model.optional(name, kinds, [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{model.path}: {name} must give each of {len(tokens)} tokens a type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": token, **plain, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)]


def _merges(model: GGUFFields) -> list[list[str]]:
    merges = [merge.split(" ") for merge in model.texts("tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{model.path}: tokenizer.ggml.merges must hold pairs of tokens")
    return merges


def _begin_with(bos: str, tokens: list[str]) -> dict[str, Any]:
    """Return the post-processor that puts the token `bos` before each text."""
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {"type": "TemplateProcessing", "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}}
