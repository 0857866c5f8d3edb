"""A submission by the handout's interface alone: none of the solution's extras, other names."""

import ast

from teaching.cutting import find_body
from teaching.starter import handout_sources

LAYER = '''
class LoRALinear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None,
                 lora_rank=0, lora_alpha=0.0, lora_dropout=0.0):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.has_weights_merged = False
        self.rank = lora_rank
        if lora_rank > 0:
            self.factor = lora_alpha / lora_rank
            self.drop = nn.Dropout(lora_dropout)
            self.lora_A = nn.Parameter(self.weight.new_zeros(lora_rank, in_features))
            self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, lora_rank))
            self.reset_parameters()

    def is_lora(self):
        return self.rank > 0

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "lora_B"):
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
            nn.init.zeros_(self.lora_B)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.is_lora() and not self.has_weights_merged:
            y = y + (self.drop(x) @ self.lora_A.t()) @ self.lora_B.t() * self.factor
        return y

    def train(self, mode=True):
        super().train(mode)
        if self.is_lora() and mode == self.has_weights_merged:
            if mode:
                self.weight.data.copy_(self.saved)
            else:
                self.saved = self.weight.data.clone()
                self.weight.data += self.factor * (self.lora_B @ self.lora_A).data
            self.has_weights_merged = not mode
        return self
'''
BODIES = {
    ("lora.py", "is_lora_name"): "return name.split('.')[-1] in {'lora_A', 'lora_B'}",
    ("lora.py", "mark_only_lora_as_trainable"): """
for each in model.parameters():
    each.requires_grad_(False)
for name, each in model.named_parameters():
    if is_lora_name(name):
        each.requires_grad_(True)
return model""",
    ("model.py", "DecoderConfig.projection"): """
wanted = set(self.lora_targets)
adapted = target in wanted or any(target in self.groups.get(name, ()) for name in wanted)
if not adapted or not self.lora_rank:
    return Projection(in_features, out_features, bias)
return Projection(in_features, out_features, bias, None, None,
                  self.lora_rank, self.lora_alpha, self.lora_dropout)""",
    ("model.py", "CausalSelfAttention.__init__"): """
super().__init__()
width = config.n_embd
self.n_head = config.n_head
self.dropout = config.dropout
self.c_attn = config.projection("c_attn", width, width * 3)
self.c_proj = config.projection("attn.c_proj", width, width)
self.resid_dropout = nn.Dropout(config.dropout)""",
    ("methods/build.py", "build_model"): """
model = load_base(name, config)
if config.trained == "lora":
    mark_only_lora_as_trainable(model)
return model.to(device)""",
    ("generate.py", "predict_labels"): """
answers = sampler.predict(dataset)
return [int(answer.label) for answer in answers]""",
    ("tasks/base.py", "ClassificationTask.parse"): r"""
words = re.findall(r"\w+", generated.lower())
seen = {label for label, word in enumerate(self.labels) if word in words}
return seen.pop() if len(seen) == 1 else -1""",
}


def plain_submission() -> dict[str, str]:
    """Return the files of the handout that a student changed, by path."""
    files = handout_sources("lora,trainable,attention,training,predict_labels")
    files = {file: files[file] for file, _ in BODIES}
    for (file, name), text in BODIES.items():
        body, lines = find_body(files[file], name), files[file].splitlines()
        lines[body.start : body.end] = [body.indent + line for line in text.strip().splitlines()]
        files[file] = "\n".join(lines) + "\n"
    files["lora.py"] = with_layer(files["lora.py"])
    return files


def with_layer(source: str) -> str:
    """Return `lora.py` with the plain layer in place of its class."""
    node = next(node for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef) and node.name == "LoRALinear")
    lines = source.splitlines()
    lines[node.lineno - 1 : node.end_lineno] = LAYER.strip().splitlines()
    return "\n".join(lines) + "\n"
