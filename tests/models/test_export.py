"""What is exported is what transformers and GGUF's reader find there."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from lora import lora_layers
from model import GPT
from models.export import export_model
from models.tokenizer import get_tokenizer


@pytest.fixture(params=["split", "shared", "none"])
def tuned(request: pytest.FixtureRequest, checkpoint: str) -> GPT:
    """A model whose adapters, if it has any, do something."""
    rank = 0 if request.param == "none" else 4
    qkv = "split" if request.param == "none" else request.param
    model = GPT.from_pretrained(checkpoint, lora_rank=rank, lora_alpha=8.0, lora_qkv=qkv,
                                lora_targets=("c_attn", "mlp.c_proj"))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    return model.eval()


def test_transformers_says_what_our_model_says(tuned: GPT, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "merged"
    export_model(tuned, get_tokenizer(), folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Instruction: classify\nText: it's a fine — café ☕ film\nLabel:"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == get_tokenizer().encode_ordinary(text)
    with torch.no_grad():
        torch.testing.assert_close(
            tuned(ids)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)
    said = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=50256)[0]
    ours = tuned.generate(ids, 8, temperature=0)[0]
    assert tokenizer.decode(ours) == tokenizer.decode(said[: len(ours)])


def to_gguf(folder: Path, path: Path, model: GPT) -> None:
    """Convert an export by the names that the gguf package itself has for GPT-2's tensors."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 48)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    for name, tensor in load_file(folder / "model.safetensors").items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known, f"gguf has no name for {name}"
        writer.add_tensor(known, (tensor.T if transposed else tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_export_converts_to_gguf_and_its_reader_lists_it(tuned: GPT, tmp_path: Path) -> None:
    export_model(tuned, get_tokenizer(), tmp_path / "merged")
    to_gguf(tmp_path / "merged", tmp_path / "model.gguf", tuned)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {"token_embd.weight", "position_embd.weight", "output_norm.bias"} <= found.keys()
    assert len(found) == 4 + 12 * tuned.config.n_layer
    merged = tuned.transformer.h[1].attn.c_attn.weight  # eval() has merged the adapters
    torch.testing.assert_close(torch.tensor(found["blk.1.attn_qkv.weight"].data), merged.detach())


def test_export_keeps_what_is_there(tuned: GPT, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"export='.*mine' is there already; name a new"):
        export_model(tuned, get_tokenizer(), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_export_that_fails_leaves_nothing(
    tuned: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("models.tokenizer.shutil.copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        export_model(tuned, get_tokenizer(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
