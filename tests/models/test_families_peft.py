"""Adapters of every family load in peft, and peft's load here, with equal gradients."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_families import Family, ids, supervise_some
from peft import LoraConfig, PeftModel, get_peft_model

from checkpoints.files import read_json
from checkpoints.peft_format import ADAPTER_CONFIG, PEFT_PREFIX, load_adapter, save_adapter
from lora import mark_only_lora_as_trainable
from model import IGNORE

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


class TestParityWithPeft:
    @pytest.mark.filterwarnings("error:.*fan_in_fan_out")
    @pytest.mark.parametrize("group", ["qkv", "attention", "all"])
    def test_saved_adapter_loads_there(self, family: Family, group: str, tmp_path: Path) -> None:
        model, idx = family.adapted(group), ids(2, 9)
        save_adapter(model, tmp_path, str(family.folder))
        assert read_json(tmp_path / ADAPTER_CONFIG)["fan_in_fan_out"] == (family.name == "gpt2")
        adapted = PeftModel.from_pretrained(copy.deepcopy(family.reference), tmp_path).eval()
        assert (adapted(idx).logits - family.reference(idx).logits).abs().max() > 0.1
        close(model(idx)[0], adapted(idx).logits)
        close(model.eval()(idx)[0], adapted(idx).logits)

    @pytest.mark.parametrize("group", ["qkv", "all"])
    def test_adapter_that_it_trained_loads_here(
        self, family: Family, group: str, tmp_path: Path
    ) -> None:
        names, idx = family.decoder.config_class.groups[group], ids(2, 9)
        config = LoraConfig(
            r=3, lora_alpha=16, target_modules=list(names), task_type="CAUSAL_LM",
            fan_in_fan_out=family.name == "gpt2")
        reference = get_peft_model(copy.deepcopy(family.reference), config)
        optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05)
        for _ in range(3):
            reference(idx, labels=idx).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reference.save_pretrained(tmp_path)
        model = family.load(
            lora_rank=3, lora_alpha=16.0, lora_targets=(group,), **family.one_pair)
        load_adapter(model, tmp_path)
        expected = reference.eval()(idx).logits
        assert (expected - family.reference(idx).logits).abs().max() > 0.1
        close(model(idx)[0], expected)

    def test_gradients_of_the_adapters_are_equal(self, family: Family, tmp_path: Path) -> None:
        model = mark_only_lora_as_trainable(family.adapted(**family.one_pair))
        save_adapter(model, tmp_path, str(family.folder))
        reference = PeftModel.from_pretrained(
            copy.deepcopy(family.reference), tmp_path, is_trainable=True)
        idx = ids(3, 9)
        targets = supervise_some(idx)
        labels = F.pad(targets[:, :-1], (1, 0), value=IGNORE)
        reference(idx, labels=labels).loss.backward()
        model(idx, targets)[1].backward()
        theirs = {name.removeprefix(PEFT_PREFIX).removesuffix(".default.weight"): p.grad
                  for name, p in reference.named_parameters() if p.requires_grad}
        ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert min(gradient.abs().max() for gradient in ours.values()) > 1e-5
        close(ours, theirs)
