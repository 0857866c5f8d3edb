"""Tiny tokenizers, trained on the repository's own texts, and tiny Llama models in GGUF files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONFIG = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False},
          "pad_token": "<|im_end|>", "chat_template": CHAT}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [(ROOT / name).read_text("utf-8") for name in ("lora.py", "README.md")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=[*SPECIAL], show_progress=False))
    return tokenizer.to_str()


def byte_level() -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE with single digits, 600 tokens."""
    return json.loads(_trained())


@cache
def _trained_sentences() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text("utf-8")], BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False))
    return tokenizer.to_str()


def sentence_piece(scheme: str = "prepend") -> dict[str, Any]:
    """Return a tokenizer.json as Llama 2 has: a space begins each text, and so does <s>.

    `scheme` is "prepend" for a normalizer, or Metaspace's "first" or "always".
    """
    tokenizer = Tokenizer.from_str(_trained_sentences())
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        contents = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        contents = json.loads(tokenizer.to_str())
    added = [token for token in contents["added_tokens"] if not token["content"].startswith("<0x")]
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return contents | {
        "added_tokens": added,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, other],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}}


def make_llama(vocab_size: int = 600, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama of transformers: 2 layers, 4 heads of 16, 2 of keys and values."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return rows of q or k as GGUF stores them: the two of a rotary pair side by side."""
    rows = torch.arange(len(weight)).view(heads, 2, -1)  # (H, 2, D/2)
    return weight[rows.transpose(1, 2).flatten()]


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Return a model's tensors by GGUF's names, q and k as Llama files have them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    tensors = {}
    for name, weight in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        for kind in heads:
            if f".{kind}_proj." in name:
                weight = interleaved(weight, heads[kind])
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[known] = weight.numpy()
    return tensors


def add_fields(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def add_tokenizer(writer: gguf.GGUFWriter, pre: str, add_bos: bool) -> None:
    contents = byte_level()
    vocabulary = contents["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_token_merges([" ".join(merge) for merge in contents["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT)


def write_gguf(
    path: Path, model: LlamaForCausalLM, kind: Kind = Kind.F32, pre: str = "smollm",
    add_bos: bool = False, changes: dict[str, Any] | None = None,
) -> Path:
    """Write `model` with matrices of one `kind`, and the byte-level tokenizer, to a GGUF file.

    `changes` replaces fields: by another value, which fixes its type, or by nothing for None.
    `general.architecture` names the family of all fields.
    """
    changes = changes or {}
    architecture = changes.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    add_fields(writer, model.config)
    add_tokenizer(writer, pre, add_bos)
    fields = writer.kv_data[0]
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, weight in gguf_tensors(model).items():
        used = kind if weight.ndim == 2 else Kind.F32
        writer.add_tensor(name, gguf.quantize(weight, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
