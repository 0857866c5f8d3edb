"""The mistakes students make, as changes of the solution, and the test that names each.

A change is (old text, new text) in one file; the old text stands there exactly once.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake; `test` should catch it, and `also` may lose points with it."""

    name: str
    test: str
    file: str
    changes: tuple[tuple[str, str], ...]
    also: tuple[str, ...] = ()


LORA, MODEL, BUILD = "lora.py", "model.py", "methods/build.py"
PREFIX = "methods/prefix_tuning.py"
BASE = "h = self.product(x, self.weight, self.bias)"
DOWN = "self.dropped_product(x, lora_A) * self.lora_scaling"
SCALING = "self.lora_scaling = lora_alpha / (lora_rank**0.5 if lora_rank_stabilized else lora_rank)"
KAIMING = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"
ZEROS = "nn.init.zeros_(self.lora_B)"
TRAIN = """        super().train(mode)
        self._demerge() if mode else self._merge()
        return self
"""
MERGE = """\
            self._unmerged_weight, self.has_weights_merged = self.weight.detach().clone(), True
            self.weight.copy_(self.merged_weight())  # subtracting it again would round: W0 is kept
"""
DEMERGE = "self.weight.copy_(self.unmerged_weight())"
GUARD = "if self.is_lora() and not self.has_weights_merged and not self._times_off:"
MARK = "parameter.requires_grad = is_lora_name(name)"
LEAF = 'return name.rpartition(".")[2] in ("lora_A", "lora_B")'
UPS = "lora_B.chunk(self.lora_groups), strict=True)"
QKV = "qkv = self.c_attn(x).view"
C_ATTN = 'self.c_attn = config.projection("c_attn", config.n_embd, 3 * config.n_embd, parts=3)'
C_PROJ = 'self.c_proj = config.projection("attn.c_proj", config.n_embd, config.n_embd)'
BUILD_MARK = "            mark_only_lora_as_trainable(model)\n        case"
PARSE = """        found = [label for label, word in enumerate(self.labels) if re.search(
            rf"(?<!\\w){re.escape(word.lower())}(?!\\w)", generated.lower())]
"""
ONLY = "return found[0] if len(found) == 1 else -1"
PREDICT = "return [prediction.label for prediction in sampler.predict(dataset)]"

MUTANTS = (
    Mutant("scaling left out of forward", "forward", LORA,
           ((DOWN, "self.product(self.lora_dropout(x), lora_A)"),)),
    Mutant("scaling is alpha, not alpha / r", "forward", LORA,
           ((SCALING, "self.lora_scaling = lora_alpha"),)),
    Mutant("alpha ignored", "forward", LORA, ((SCALING, "self.lora_scaling = 1 / lora_rank"),)),
    Mutant("bias forgotten", "forward", LORA,
           ((BASE, "h = self.product(x, self.weight)"),),
           ("construction", "attention")),
    Mutant("update subtracted", "forward", LORA,
           (("return h + (torch.cat", "return h - (torch.cat"),)),
    Mutant("A stored transposed", "construction", LORA, (
        ("torch.empty(lora_groups * lora_rank, in_features, **like)",
         "torch.empty(in_features, lora_groups * lora_rank, **like)"),
        ("lora_A, lora_B = self.lora_A.to(dtype)", "lora_A, lora_B = self.lora_A.T.to(dtype)"),
        ("lora_A = self.lora_A.to(dtype)", "lora_A = self.lora_A.T.to(dtype)"),
    ), ("start",)),
    Mutant("rank 0 still has an adapter", "construction", LORA, ((
        "        if lora_rank == 0:\n            return\n        self.lora_groups",
        "        lora_rank = lora_rank or 1\n        self.lora_groups"),),
           ("attention", "friendly")),
    Mutant("A and B swapped at the start", "start", LORA, (
        (KAIMING, "nn.init.zeros_(self.lora_A)"),
        (ZEROS, "nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))"))),
    Mutant("B not zero", "start", LORA, ((ZEROS, "nn.init.normal_(self.lora_B, std=0.02)"),)),
    Mutant("A zero as well", "start", LORA, ((KAIMING, "nn.init.zeros_(self.lora_A)"),)),
    Mutant("A of another distribution", "start", LORA,
           ((KAIMING, "nn.init.normal_(self.lora_A)"),)),
    Mutant("reset_parameters leaves the adapter", "start", LORA, (
        ("\n        self.reset_parameters()\n", "\n        self.reset_lora_parameters()\n"),
        ("        if self.is_lora():  # nn.Linear.__init__ calls this before A and B exist\n"
         "            self.reset_lora_parameters()\n", ""))),
    Mutant("dropout after A", "dropout", LORA,
           ((DOWN, "self.lora_dropout(self.product(x, lora_A)) * self.lora_scaling"),)),
    Mutant("dropout on the base as well", "dropout", LORA,
           ((BASE, f"x = self.lora_dropout(x) if self.is_lora() else x\n        {BASE}"),)),
    Mutant("dropout after B", "dropout", LORA, (
        (DOWN, "self.product(x, lora_A) * self.lora_scaling"),
        ("return h + (torch.cat(ups, dim=-1) if len(ups) > 1 else ups[0])",
         "return h + self.lora_dropout(torch.cat(ups, dim=-1))"))),
    Mutant("dropout forgotten", "dropout", LORA,
           ((DOWN, "self.product(x, lora_A) * self.lora_scaling"),)),
    Mutant("dropout without its rescaling", "dropout", LORA,
           ((DOWN, "self.product(self.lora_dropout(x) * (1 - self.lora_dropout.p), lora_A) "
                   "* self.lora_scaling"),)),
    Mutant("B @ A in forward", "thin", LORA, (
        ("        down = self.dropped_product", "        if self.lora_groups == 1:\n"
         "            x = self.lora_dropout(x)\n"
         "            return h + x @ (lora_B @ lora_A).T * self.lora_scaling\n"
         "        down = self.dropped_product"),)),
    Mutant("merge in an eval() that parents never call", "merge", LORA, ((
        TRAIN, """        super().train(mode)
        if mode:
            self._demerge()
        return self

    def eval(self) -> "LoRALinear":
        super().eval()
        self._merge()
        return self
"""),)),
    Mutant("train() returns None", "merge", LORA, ((TRAIN, TRAIN.replace("return self", "pass")),)),
    Mutant("never demerged", "merge", LORA,
           ((TRAIN, TRAIN.replace("self._demerge() if mode else self._merge()",
                                  "None if mode else self._merge()")),), ("cycles",)),
    Mutant("merged without the scaling", "merge", LORA,
           (("(lora_B @ lora_A).flatten(0, 1) * self.lora_scaling",
             "(lora_B @ lora_A).flatten(0, 1)"),)),
    Mutant("update counted again when merged", "merge", LORA,
           (("if self.has_weights_merged or self._times_off", "if self._times_off"),),
           ("dropout",)),
    Mutant("double merge", "twice", LORA, ((GUARD, "if self.is_lora() and not self._times_off:"),)),
    Mutant("update subtracted at every train()", "twice", LORA, (
        ("        if self.has_weights_merged:\n            self.weight.copy_(",
         "        if self.is_lora():\n            self.weight.copy_(\n"
         "                self.weight - self.delta_weight() if not self.has_weights_merged else "),
    )),
    Mutant("+= and -= drift", "cycles", LORA, (
        (MERGE, "            self.weight += self.delta_weight().to(self.weight.dtype)\n"
                "            self.has_weights_merged = True\n"),
        (DEMERGE, "self.weight -= self.delta_weight().to(self.weight.dtype)"))),
    Mutant("base left trainable", "trainable", LORA,
           ((MARK, "parameter.requires_grad |= is_lora_name(name)"),)),
    Mutant("adapters found by substring", "trainable", LORA, ((LEAF, 'return "lora_" in name'),)),
    Mutant("adapters found by their ending", "trainable", LORA,
           ((LEAF, 'return name.endswith(("lora_A", "lora_B"))'),)),
    Mutant("only B trained", "trainable", LORA,
           ((MARK, 'parameter.requires_grad = name.endswith(".lora_B")'),)),
    Mutant("biases trained too", "trainable", LORA,
           ((MARK, 'parameter.requires_grad = is_lora_name(name) or name.endswith("bias")'),)),
    Mutant("adapters left frozen", "trainable", LORA,
           ((MARK, "parameter.requires_grad &= is_lora_name(name)"),)),
    Mutant("q, k and v given one B", "qkv", LORA,
           ((UPS, "[lora_B.chunk(self.lora_groups)[0]] * self.lora_groups, strict=True)"),)),
    Mutant("k left without an update", "qkv", LORA, ((
        "        return h + (torch.cat", "        ups[1:2] = [0 * up for up in ups[1:2]]\n"
        "        return h + (torch.cat"),)),
    Mutant("attention uses the bare weight", "attention", MODEL,
           ((QKV, "qkv = F.linear(x, self.c_attn.weight, self.c_attn.bias).view"),),
           ("friendly",)),
    Mutant("adapter on the output projection instead", "attention", MODEL, (
        (C_ATTN, C_ATTN.replace('"c_attn"', '"attn.c_proj"')),
        (C_PROJ, C_PROJ.replace('"attn.c_proj"', '"c_attn"'))), ("qkv",)),
    Mutant("adapter in the last block only", "attention", MODEL, (
        ("            \"h\": nn.ModuleList(Block(config) for _ in range(config.n_layer)),",
         "            \"h\": nn.ModuleList(\n"
         "                Block(config if i == config.n_layer - 1 else type(config)(\n"
         "                    block_size=config.block_size, vocab_size=config.vocab_size,\n"
         "                    n_layer=config.n_layer, n_head=config.n_head,\n"
         "                    n_embd=config.n_embd))\n"
         "                for i in range(config.n_layer)),"),), ("qkv",)),
    Mutant("model never marked", "friendly", BUILD,
           ((BUILD_MARK, "            pass\n        case"),)),
    Mutant("full fine-tuning frozen too", "friendly", BUILD,
           (("    match config.trained:\n        case \"lora\":\n            mark_only",
             "    mark_only_lora_as_trainable(model)\n    match config.trained:\n"
             "        case \"lora\":\n            mark_only"),)),
    Mutant("last norm trained with the adapters", "friendly", BUILD,
           ((BUILD_MARK, BUILD_MARK.replace(
               "\n        case", "\n            model.norm.requires_grad_(True)\n        case")),)),
    Mutant("labels found as substrings", "labels", "tasks/base.py",
           ((PARSE, "        found = [label for label, word in enumerate(self.labels)\n"
                    "                 if word in generated.lower()]\n"),)),
    Mutant("labels in lower case only", "labels", "tasks/base.py",
           ((PARSE, PARSE.replace("generated.lower()", "generated")),)),
    Mutant("first of two labels wins", "labels", "tasks/base.py",
           ((ONLY, "return found[0] if found else -1"),)),
    Mutant("garbage is negative", "labels", "tasks/base.py",
           ((ONLY, "return found[0] if len(found) == 1 else 0"),)),
    Mutant('"1" is positive', "labels", "tasks/base.py",
           ((ONLY, 'return 1 if "1" in generated else found[0] if len(found) == 1 else -1'),)),
    Mutant("garbage left out of the list", "labels", "generate.py",
           ((PREDICT, "return [each.label for each in sampler.predict(dataset)\n"
                      "            if each.label >= 0]"),)),
    Mutant("garbage left out of the denominator", "garbage", "tasks/scores.py",
           (('"accuracy": right / len(labels),',
             '"accuracy": right / max(1, len(guesses) - guesses.count(-1)),'),)),
    Mutant("a space after the test prompt", "prompts", "generate.py",
           (("prompts = [self.loader.encode_prompt(each, self.room) for",
             'prompts = [[*self.loader.encode_prompt(each, self.room),\n'
             '                    *self.loader.tokenizer.encode_ordinary(" ")] for'),)),
    Mutant("another prompt at the test", "prompts", "generate.py",
           ((PREDICT, 'sampler.loader.task.template = "{text}"\n    ' + PREDICT),)),
    Mutant("biases found by substring", "bitfit", "methods/bitfit.py",
           (('return name.rpartition(".")[2] == "bias"', 'return "bias" in name'),)),
    Mutant("bottleneck without its skip connection", "bottleneck", "methods/bottleneck.py",
           (("return x + self.up(", "return self.up("),)),
    Mutant("bottleneck behind the attention only", "bottleneck", "methods/bottleneck.py",
           (('SLOTS = ("resid_dropout", "mlp.dropout")', 'SLOTS = ("resid_dropout",)'),)),
    Mutant("base trained with the bottlenecks", "bottleneck", "methods/bottleneck.py",
           (("    model.requires_grad_(False)\n", ""),)),
    Mutant("keys and values swapped", "prefix", PREFIX,
           (("zip(parts[::2], parts[1::2]", "zip(parts[1::2], parts[::2]"),)),
    Mutant("reshaped where axes should be swapped", "prefix", PREFIX,
           (("self.flat().unflatten(1, self.shape).permute(1, 2, 0, 3)[:, None]",
             "self.flat().view(*self.shape[:2], -1, self.shape[2])[:, None]"),)),
    Mutant("network of the prefix left out", "prefix", PREFIX, (
        ("parts = self.flat().", "parts = (self.flat() if isinstance(self.network, nn.Identity)\n"
         "                 else torch.zeros_like(self.flat()))."),)),
    Mutant("base trained with the prefix", "prefix", PREFIX,
           (("    model.requires_grad_(False)\n", ""),)),
    Mutant("prefix starts at random", "prefix", PREFIX,
           (("computed = model.prefill(words.to(model.device))",
             "computed = [(torch.randn_like(k), torch.randn_like(v))\n"
             "                for k, v in model.prefill(words.to(model.device))]"),)),
    Mutant("positions of the prefix not counted", "prefix", PREFIX,
           (("    model.config = replace(config, prefix_tokens=tokens)\n", ""),)),
    Mutant("DPO pulls towards the rejected answer", "preference", "methods/dpo.py",
           (("margin = chosen - rejected\n", "margin = rejected - chosen\n"),)),
    Mutant("DPO without its reference", "preference", "methods/dpo.py",
           (("(beta * (log_probs - reference)).chunk(2)", "(beta * log_probs).chunk(2)"),)),
    Mutant("DPO's loss summed over the pairs", "preference", "methods/dpo.py",
           (("        losses.mean(), (margin", "        losses.sum(), (margin"),)),
    Mutant("DPO's margin logged as a share", "preference", "methods/dpo.py",
           (("rejected.mean(), margin.mean(),", "rejected.mean(), margin.sigmoid().mean(),"),)),
)
