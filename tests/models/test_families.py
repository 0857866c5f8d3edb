"""Every family computes what transformers and peft compute, and keeps each contract of a decoder.

The contracts stand in `Decoder`; each test runs on a tiny checkpoint of each family.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_families import (
    BLOCK,
    LAYERS,
    VOCABULARY,
    Family,
    ids,
    join_logits,
    join_tokens,
    own_tensors,
    pick_targets,
    recompute_greedily,
    supervise_some,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from checkpoints.files import read_json, write_json
from checkpoints.hub_format import CONFIG, INDEX
from lora import LoRALinear, lora_layers, mark_only_lora_as_trainable
from methods.build import store_frozen_projections
from model import GPT, IGNORE, Decoder
from models.families import load_config, load_decoder
from models.llama import Llama
from runtime import batching, kv_cache
from runtime.device import autocast
from runtime.kv_cache import Cache, KeyValue

NAMES = {  # of the projections in each group
    GPT: {"qkv": "c_attn", "attention": "c_attn attn.c_proj",
          "all": "c_attn attn.c_proj mlp.c_fc mlp.c_proj"},
    Llama: {"qkv": "q_proj k_proj v_proj", "attention": "q_proj k_proj v_proj o_proj",
            "all": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"},
}

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Cache, int, KeyValue]]:
    """Record each append: the cache, the layer, and the buffers of the layer."""
    held = []

    class RecordedCache(Cache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
            all_of_layer = super().append(layer, k, v)
            held.append((self, layer, self.buffers[layer]))
            return all_of_layer

    monkeypatch.setattr("model.Cache", RecordedCache)
    return held


class TestParityWithTransformers:
    @pytest.mark.parametrize("sharded", [False, True])
    def test_logits_loss_and_greedy_ids_are_equal(
        self, family: Family, sharded: bool, tmp_path: Path
    ) -> None:
        folder, idx = family.folder, ids(3, 12)
        if sharded:
            folder = tmp_path
            family.reference.save_pretrained(folder, max_shard_size="20KB")
            assert len(set(read_json(folder / INDEX)["weight_map"].values())) > 2
        model = replace(family, folder=folder).load().eval()
        targets = supervise_some(idx)
        labels = F.pad(targets[:, :-1], (1, 0), value=IGNORE)  # transformers shifts them itself
        with torch.no_grad():
            expected = family.reference(idx, labels=labels)
        close(model(idx)[0], expected.logits)
        close(model(idx, targets)[1], expected.loss)
        greedy = family.reference.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=15, do_sample=False,
            pad_token_id=0)
        equal(model.generate(idx, 15, temperature=0), greedy)

    @pytest.mark.parametrize("several", [False, True])
    def test_generation_stops_at_the_same_tokens(self, family: Family, several: bool) -> None:
        model, idx = family.load().eval(), ids(3, 6)
        free = model.generate(idx, 20, temperature=0)[:, 6:]
        ends = (int(free[0, 2]), int(free[1, 4]), int(free[2, 7]))[: 3 if several else 1]
        model.config = replace(model.config, end_of_text=ends)
        expected = family.reference.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False,
            eos_token_id=list(ends), pad_token_id=ends[0])
        equal(model.generate(idx, 20, temperature=0), expected)
        assert (expected[0, 9:] == ends[0]).all()  # row 0 has ended
        assert not several or expected.size(1) < 26  # all rows have

    def test_weights_load_bit_equal(self, family: Family) -> None:
        model = family.load()
        equal(dict(model.state_dict()), own_tensors(family.reference, model))

    def test_saved_model_loads_bit_equal_there_and_here(
        self, family: Family, tmp_path: Path
    ) -> None:
        model, idx = load_decoder(family.folder).eval(), ids(2, 20)
        model.save_pretrained(tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(reference) is type(family.reference)
        equal(own_tensors(reference, model), dict(model.state_dict()))
        equal(reference(idx).logits, family.reference(idx).logits)
        again = load_decoder(tmp_path)
        assert again.config == model.config == load_config(tmp_path)
        equal(dict(again.state_dict()), dict(model.state_dict()))

    @pytest.mark.parametrize("training", [True, False])
    def test_saved_adapted_model_is_merged(
        self, family: Family, training: bool, tmp_path: Path
    ) -> None:
        model, idx = family.adapted().train(training), ids(2, 9)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.config = replace(model.config, end_of_text=(7,))
        model.save_pretrained(tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        close(reference(idx).logits, model(idx)[0])
        equal(dict(model.state_dict()), before)
        saved = own_tensors(reference, model)
        for name, layer in lora_layers(model).items():
            equal(saved[f"{name}.weight"], layer.merged_weight())


class TestForward:
    def test_logits_with_targets_are_the_supervised_rows_in_row_major_order(
        self, family: Family
    ) -> None:
        model, idx = family.load(), ids(3, 10)
        targets = supervise_some(idx)
        logits, loss = model(idx, targets)
        everywhere, no_loss = model(idx)
        assert no_loss is None
        close(logits, everywhere[targets != IGNORE])
        close(loss, F.cross_entropy(
            everywhere.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
        each = model.nats(idx, targets)
        close(each.mean(), loss)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("length", [9, 20])  # at the longer one the prefix is copied
    def test_prefix_equals_the_joint_computation(
        self, family: Family, batch: int, length: int
    ) -> None:
        model, prefix, idx = family.adapted(), ids(1, 7), ids(batch, length)
        joint, _ = model(torch.cat((prefix.expand(batch, -1), idx), dim=1))
        close(model(idx, past=model.prefill(prefix))[0], joint[:, 7:])
        close(model(idx, past=model.prefill(ids(1, 0)))[0], model(idx)[0])

    def test_prefix_of_several_rows_is_refused(self, family: Family) -> None:
        with pytest.raises(ValueError, match="it is 1 sequence, not 3"):
            family.load().prefill(ids(3, 7))

    @pytest.mark.parametrize("targets", [None, "qkv", "attention", "all"])
    def test_shared_prefix_equals_the_plain_padded_computation(
        self, family: Family, targets: str | None
    ) -> None:
        model, prefix, idx = family.load(), ids(1, 8), ids(3, 7)
        if targets:
            model = mark_only_lora_as_trainable(family.adapted(targets))
        lengths = torch.tensor([[7], [4], [2]])
        supervised = (torch.arange(7) < lengths - 1) & (torch.arange(7) >= lengths - 3)
        targets = pick_targets(idx, supervised)
        plain_logits, plain_loss = model(
            torch.cat((prefix.expand(3, -1), idx), dim=1), F.pad(targets, (8, 0), value=IGNORE))
        logits, loss = model(idx, targets, model.prefill(prefix))
        close(logits, plain_logits)
        close(loss, plain_loss)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plain, shared = (torch.autograd.grad(x, list(trained.values()))
                         for x in (plain_loss, loss))
        assert min(gradient.abs().max() for gradient in plain) > 1e-5
        close(dict(zip(trained, shared, strict=True)), dict(zip(trained, plain, strict=True)))

    def test_gradient_through_prefill_is_the_slope_of_the_loss(self, family: Family) -> None:
        # More than 2 D queries: for fewer the attention weights are in float32.
        model, prefix = family.adapted().double(), ids(1, 6)
        idx, targets = ids(2, 26), ids(2, 26)
        weights = list(model.requires_grad_().parameters())
        past = model.prefill(prefix)
        kept = [tensor for pair in past for tensor in pair]
        gradients = torch.autograd.grad(model(idx, targets, past)[1], weights + kept)
        assert min(gradient.abs().max() for gradient in gradients) > 1e-5
        moves = [torch.randn_like(weight) for weight in weights]
        losses = []
        for step in (1e-6, -2e-6):  # to both sides of the weights
            torch._foreach_add_([weight.data for weight in weights], moves, alpha=step)
            losses.append(model(idx, targets, model.prefill(prefix))[1])
        slope = sum((g * m).sum() for g, m in zip(gradients, moves, strict=False))
        close((losses[0] - losses[1]) / 2e-6, slope)

    @pytest.mark.parametrize(("prefix", "length"), [(0, 33), (9, 24)])
    def test_sequence_longer_than_the_block_is_refused(
        self, family: Family, prefix: int, length: int
    ) -> None:
        model, idx = family.load(), ids(2, length)
        past = model.prefill(ids(1, prefix)) if prefix else None
        assert model(idx[:, :-1], None, past)[0].size(1) == length - 1
        with pytest.raises(ValueError, match=r"sequence of 33 tokens .* block_size=32"):
            model(idx, idx, past)

    def test_prefix_longer_than_the_block_is_refused(self, family: Family) -> None:
        with pytest.raises(ValueError, match=r"33 tokens .* block_size=32"):
            family.load().prefill(ids(1, 33))


class TestGeneration:
    # Within the block, across its end, exactly full at the start, and longer than it.
    @pytest.mark.parametrize(("prompt", "steps"), [(5, 6), (26, 12), (32, 5), (39, 4)])
    def test_each_step_equals_recomputation_over_a_sliding_window(
        self, family: Family, prompt: int, steps: int
    ) -> None:
        model, idx = family.adapted().eval(), ids(3, prompt)
        for step in model.stream(idx.tolist(), steps, temperature=0):
            expected = model(idx[:, -BLOCK:])[0][:, -1]
            assert sorted(step.rows) == [0, 1, 2]
            close(step.logits, expected[step.rows])
            equal(step.tokens, expected[step.rows].argmax(-1, keepdim=True))
            idx = torch.cat((idx, expected.argmax(-1, keepdim=True)), dim=1)
        assert idx.size(1) == prompt + steps

    @pytest.mark.parametrize("prefix_length", [0, 6])
    @pytest.mark.parametrize("part_tokens", [4, 512], ids=["in parts", "together"])
    @pytest.mark.parametrize("places", [None, 2])
    def test_rows_stream_what_each_would_alone(
        self, family: Family, prefix_length: int, places: int | None, part_tokens: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Of different lengths, with different limits, in a batch that takes all or two of them."""
        monkeypatch.setattr(kv_cache, "PART_TOKENS", part_tokens)
        model, idx, prefix = family.adapted().eval(), ids(4, 9), ids(1, prefix_length)
        past, lengths, limits = model.prefill(prefix) if prefix_length else None, (9, 4, 1, 9), (
            8, 2, 5, 7)
        prompts = [row[:length] for row, length in zip(idx.tolist(), lengths, strict=True)]
        steps = list(model.stream(prompts, limits, 0, past=past, batch_size=places))
        assert max(len(step.rows) for step in steps) == (places or 4)
        for row, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
            prompt = idx[row : row + 1, :length]
            alone = recompute_greedily(model, torch.cat((prefix, prompt), dim=1), limit)
            equal(join_tokens(steps)[row, :limit], alone[0, -limit:])
            equal(model.generate(prompt, limit, temperature=0, past=past)[:, length:],
                  alone[:, -limit:])
            close(join_logits(steps, row), model(alone[:, :-1])[0][0, -limit:])

    @pytest.mark.parametrize(("fewest", "rows"), [
        (1, [[0, 3], [0, 1], [0, 1], [0, 1], [2], [2], [2]]),
        (3, [[0, 3], [0], [0], [0], [1, 2], [1, 2], [1, 2]]),
    ])
    def test_prompts_of_enough_tokens_take_the_places_of_ended_rows(
        self, family: Family, fewest: int, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batching, "FEWEST_TOKENS", fewest)
        model, prompts = family.load().eval(), [[1, 2, 3], [4, 5], [6], [7, 8, 9, 1]]
        model.config = replace(model.config, end_of_text=(VOCABULARY,))  # no token
        steps = list(model.stream(prompts, (4, 3, 3, 1), 0, batch_size=2))
        assert [step.rows for step in steps] == rows

    def test_prompt_past_and_new_tokens_may_fill_the_block_exactly(self, family: Family) -> None:
        model, prefix, idx = family.load().eval(), ids(1, 16), ids(1, 11)
        expected = recompute_greedily(model, torch.cat((prefix, idx), dim=1), 6)
        past = model.prefill(prefix)
        equal(model.generate(idx, 6, temperature=0, past=past), expected[:, 16:])
        with pytest.raises(ValueError, match="7 new tokens exceed block_size=32"):
            model.generate(idx, 7, temperature=0, past=past)

    # Within the block, across its end, longer than it.
    @pytest.mark.parametrize(
        ("prompt", "steps", "slots"), [(5, 6, 10), (26, 12, 32), (39, 4, 32)])
    def test_cache_allocates_its_memory_once(
        self, family: Family, appended: list, prompt: int, steps: int, slots: int
    ) -> None:
        list(family.load().eval().stream(ids(3, prompt).tolist(), steps, temperature=0))
        assert len(appended) == LAYERS * steps
        addresses = {(cache, layer, *(tensor.data_ptr() for tensor in pair))
                     for cache, layer, pair in appended}
        assert len(addresses) == LAYERS  # one pair of buffers per layer
        width = {"gpt2": 32, "llama": 16, "llama3": 12, "qwen2": 32}[family.name]  # heads · D
        sizes = {tensor.untyped_storage().nbytes() for _, _, pair in appended for tensor in pair}
        assert sizes == {4 * 3 * slots * width}  # bytes of float32 · B · slots · width

    def test_cache_holds_the_keys_and_values_of_prefill(
        self, family: Family, appended: list
    ) -> None:
        model, idx = family.load().eval(), ids(1, 6)
        new = join_tokens(list(model.stream(idx.tolist(), 4, temperature=0)))
        last_of_layers = [pair for _, _, pair in appended[-LAYERS:]]
        close(last_of_layers, model.prefill(torch.cat((idx, new[:, :-1]), dim=1)))

    def test_cache_has_the_dtype_that_autocast_computes_in(
        self, family: Family, appended: list
    ) -> None:
        with autocast(torch.device("cpu"), torch.bfloat16):
            list(family.load().eval().stream(ids(2, 5).tolist(), 3, temperature=0))
        assert {tensor.dtype for _, _, pair in appended for tensor in pair} == {torch.bfloat16}


class TestModes:
    @pytest.mark.parametrize("changes", [{"dropout": 0.3}, {"lora_dropout": 0.3}], ids=str)
    def test_dropout_acts_in_training_only(self, family: Family, changes: dict) -> None:
        model, sure, idx = family.adapted(**changes), family.adapted(), ids(2, 9)
        sure.load_state_dict(model.state_dict())
        assert not torch.allclose(model(idx)[0], model(idx)[0])
        model.eval()
        equal(model(idx)[0], model(idx)[0])
        close(model(idx)[0], sure(idx)[0])

    def test_each_dropout_acts_by_itself(self, family: Family) -> None:
        model, idx = family.load(dropout=0.3).eval(), ids(2, 9)
        sites = {name: module for name, module in model.named_modules()
                 if isinstance(module, nn.Dropout)
                 or isinstance(getattr(module, "dropout", None), float)}
        assert len(sites) == 3 * LAYERS + (family.name == "gpt2")  # its embedding has one
        for name, module in sites.items():
            module.training = True
            assert not torch.allclose(model(idx)[0], model(idx)[0]), name
            module.training = False

    def test_fresh_adapters_change_no_output(self, family: Family) -> None:
        plain, idx = family.load(), ids(2, 9)
        model = family.load(lora_rank=4, lora_alpha=8.0, lora_targets=("all",))
        assert all(layer.lora_A.abs().max() > 0 for layer in lora_layers(model).values())
        for mode in (True, False):
            equal(model.train(mode)(idx)[0], plain(idx)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_eval_merges_and_train_restores_every_bit(
        self, family: Family, dtype: torch.dtype
    ) -> None:
        model, idx = mark_only_lora_as_trainable(family.adapted()), ids(2, 9)
        store_frozen_projections(model, dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with autocast(torch.device("cpu"), dtype):
            adapted, _ = model(idx)
            for _ in range(2):
                merged, _ = model.eval()(idx)
                for name, layer in lora_layers(model).items():
                    assert layer.has_weights_merged
                    assert not torch.equal(layer.weight, before[f"{name}.weight"])
                equal(dict(model.state_dict()), before)
                equal(dict(model.train().named_parameters()), before)
        bound = 1e-5 if dtype == torch.float32 else 0.03
        assert (merged - adapted).norm() < bound * adapted.norm()

    @pytest.mark.parametrize("training", [True, False])
    def test_residual_stream_stays_float32_over_bfloat16_matrices(
        self, family: Family, training: bool
    ) -> None:
        model, idx = mark_only_lora_as_trainable(family.adapted()).train(training), ids(2, 9)
        expected, _ = model(idx)
        store_frozen_projections(model, torch.bfloat16)
        stream = []
        for block in model.blocks:
            block.register_forward_hook(
                lambda module, inputs, output: stream.append(output[0].dtype))
        with autocast(torch.device("cpu"), torch.bfloat16):
            logits, _ = model(idx)
        assert stream == [torch.float32] * LAYERS
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())  # nor are they rounded to 16 bits
        assert 0 < (logits - expected).norm() < 0.03 * expected.norm()

    def test_loss_and_gradients_in_bfloat16_are_near_those_in_float32(
        self, family: Family
    ) -> None:
        model, prefix, idx = mark_only_lora_as_trainable(family.adapted()), ids(1, 5), ids(3, 9)
        targets = supervise_some(idx)

        def gradients() -> Tensor:
            _, loss = model(idx, targets, model.prefill(prefix))
            found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            return torch.cat([loss[None], *(gradient.flatten() for gradient in found)])

        expected = gradients()
        store_frozen_projections(model, torch.bfloat16)
        with autocast(torch.device("cpu"), torch.bfloat16):
            found = gradients()
        assert 0 < (found - expected).norm() < 0.05 * expected.norm()

    @pytest.mark.parametrize(
        "freeze", [mark_only_lora_as_trainable, lambda model: model.requires_grad_(False)],
        ids=["base", "all"])
    def test_only_frozen_projections_are_stored_in_lower_precision(
        self, family: Family, freeze: Callable[[Decoder], Decoder]
    ) -> None:
        model = freeze(family.adapted("qkv"))
        store_frozen_projections(model, torch.bfloat16)
        projections = {f"{name}.weight" for name, module in model.named_modules()
                       if isinstance(module, LoRALinear)}
        assert len(projections) == LAYERS * len(model.config.groups["all"])
        for name, parameter in model.named_parameters():
            expected = torch.bfloat16 if name in projections else torch.float32
            assert parameter.dtype == expected, name

    def test_trained_projections_keep_their_precision(self, family: Family) -> None:
        model = family.load()
        store_frozen_projections(model, torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class TestTargets:
    @pytest.mark.parametrize("group", ["qkv", "attention", "all"])
    def test_groups_equal_the_union_of_their_names(self, family: Family, group: str) -> None:
        def adapted(*targets: str) -> set[str]:
            config = replace(load_config(family.folder), lora_rank=4, lora_targets=targets)
            with torch.device("meta"):
                return set(lora_layers(family.decoder(config)))

        names = NAMES[family.decoder][group].split()
        each = [adapted(name) for name in names]
        assert adapted(group) == adapted(*names) == set.union(*each)
        assert sum(map(len, each)) == LAYERS * len(names)
        assert all(layer.endswith(f".{name}")
                   for layers, name in zip(each, names, strict=True) for layer in layers)

    def test_all_is_every_projection_but_the_head(self, family: Family) -> None:
        model = family.adapted("all")
        linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert linears - {"lm_head"} == set(lora_layers(model))

    def test_unknown_targets_are_refused_in_one_line(self, family: Family) -> None:
        for target in ("lm_head", "proj", "q_proj" if family.name == "gpt2" else "c_attn"):
            with pytest.raises(ValueError, match=f"unknown {target}; allowed are qkv, attention"):
                family.load(lora_rank=4, lora_targets=("qkv", target))

    def test_one_a_for_q_k_and_v_is_for_gpt2_alone(self, family: Family) -> None:
        settings = {"lora_rank": 4, "lora_qkv": "shared"}
        if family.name == "gpt2":
            assert {layer.lora_groups for layer in
                    lora_layers(family.load(**settings)).values()} == {1}
        else:
            with pytest.raises(ValueError, match=r"^lora_qkv=shared is for GPT-2, .*$"):
                family.load(**settings)


class TestFamilies:
    def test_config_says_which_family_a_checkpoint_is_of(self, family: Family) -> None:
        assert type(load_decoder(family.folder)) is family.decoder
        assert load_config(family.folder) == load_decoder(family.folder).config
        assert load_config(family.folder).vocab_size == VOCABULARY

    def test_another_family_is_refused_in_one_line(self, family: Family) -> None:
        other, kinds = (Llama, "llama, qwen2") if family.decoder is GPT else (GPT, "gpt2")
        kind = family.reference.config.model_type
        message = rf"^.*: model_type='{kind}', but this model is one of {kinds}$"
        with pytest.raises(ValueError, match=message):
            other.from_pretrained(family.folder)

    @pytest.mark.parametrize("kind", ["mistral", "", None, ["llama"], {"a": 1}, 7, "x" * 10**5])
    def test_other_families_are_refused_in_one_line(
        self, family: Family, kind: Any, tmp_path: Path
    ) -> None:
        write_json(tmp_path / CONFIG, read_json(family.folder / CONFIG) | {"model_type": kind})
        with pytest.raises(ValueError, match=r"must be one of gpt2, llama, qwen2$") as refusal:
            load_decoder(tmp_path)
        assert len(str(refusal.value)) < 400
