"""The code of docs/library.md runs from top to bottom and does what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from lora import lora_layers

PAGE = (Path(__file__).parent.parent / "docs" / "library.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the blocks leave behind, executed one after the other in an empty folder."""
    pytest.importorskip("transformers")
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("page")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for block in BLOCKS:
            exec(compile(block, "docs/library.md", "exec"), names)  # noqa: S102 - our own page
    return names


def test_encoder_learns_and_adapters_off_gives_the_model_it_was(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True)
    untouched = nn.TransformerEncoder(block, num_layers=2).eval()
    with torch.no_grad():
        assert_close(page["base"], untouched(page["x"]), **EXACT)
    assert (page["tuned"] - page["base"]).abs().max() > 1e-3
    assert set(lora_layers(page["encoder"])) == {
        f"layers.{index}.linear{part}" for index in (0, 1) for part in (1, 2)
    }


def test_saved_adapter_holds_a_and_b_only_and_carries_the_llama_over(page: dict[str, Any]) -> None:
    targets = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert set(load_file(page["folder"] / "adapter.safetensors")) == {
        f"model.layers.{index}.{target}.{leaf}"
        for index in (0, 1) for target in targets for leaf in ("lora_A", "lora_B")
    }
    llama, loaded, tokens = page["llama"], page["loaded"], page["tokens"]
    with torch.no_grad():
        assert_close(loaded(tokens).logits, llama.eval()(tokens).logits, **EXACT)
        with page["adapters_off"](loaded):
            base = loaded(tokens).logits
        assert (loaded(tokens).logits - base).abs().max() > 1e-3


def test_plain_llama_with_merged_weights_equals_the_adapted_one(page: dict[str, Any]) -> None:
    assert lora_layers(page["plain"]) == {}
    with torch.no_grad():
        assert_close(
            page["plain"](page["tokens"]).logits, page["loaded"](page["tokens"]).logits, **EXACT)
