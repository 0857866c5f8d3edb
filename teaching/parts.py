"""The parts of the homework that students write: which functions, in which file, and what to do."""

from typing import NamedTuple

from configurator import ROOT


class Cut(NamedTuple):
    """A function whose body students write, by its qualified name; `todo` says what it does."""

    part: str
    file: str
    name: str
    todo: str

    @property
    def message(self) -> str:
        return f"TODO {self.part}: {self.name} in {self.file}: {self.todo}"


FIRST = ("lora", "trainable", "attention", "training", "predict_labels")
SECOND = ("method", "dpo")
CUTS = (
    Cut("lora", "lora.py", "LoRALinear.__init__",
        "make the nn.Linear; with a rank, add frozen lora_A and lora_B, the scaling, the dropout"),
    Cut("lora", "lora.py", "LoRALinear.reset_parameters",
        "reset the base, then A and B once they exist"),
    Cut("lora", "lora.py", "LoRALinear.reset_lora_parameters",
        "draw A, set B so that the update starts at zero"),
    Cut("lora", "lora.py", "LoRALinear.forward",
        "return the base output plus the update of the formula, through r features"),
    Cut("lora", "lora.py", "LoRALinear.train",
        "merge in evaluation mode, restore W0 in training mode; return the layer"),
    Cut("lora", "lora.py", "LoRALinear.delta_weight", "compute the update, (out, in)"),
    Cut("lora", "lora.py", "LoRALinear.merged_weight", "compute W0 plus the update"),
    Cut("lora", "lora.py", "LoRALinear.unmerged_weight", "find W0, also while it is merged"),
    Cut("lora", "lora.py", "LoRALinear._merge", "put the update into the weight, once"),
    Cut("lora", "lora.py", "LoRALinear._demerge", "take the update out again, bit for bit"),
    Cut("trainable", "lora.py", "is_lora_name", "compare the last component of the name"),
    Cut("trainable", "lora.py", "mark_only_lora_as_trainable",
        "train the adapters, freeze all else"),
    Cut("attention", "model.py", "DecoderConfig.projection",
        "make the projection, adapted if lora_targets names it, by the settings of this config"),
    Cut("attention", "model.py", "CausalSelfAttention.__init__",
        "make c_attn for q, k and v at once, c_proj, resid_dropout; keep n_head and dropout"),
    Cut("training", "methods/build.py", "build_model",
        "load the model, freeze and add what the method says, move it to the device"),
    Cut("predict_labels", "generate.py", "predict_labels",
        "let the sampler answer each record; return one label each, -1 for garbage"),
    Cut("predict_labels", "tasks/base.py", "ClassificationTask.parse",
        "find the one label word in an answer; anything else is garbage"),
    Cut("method", "methods/bitfit.py", "train_biases", "train the biases and nothing else"),
    Cut("method", "methods/bottleneck.py", "Bottleneck.__init__",
        "make the two layers, near zero at first"),
    Cut("method", "methods/bottleneck.py", "Bottleneck.forward", "compute the formula above"),
    Cut("method", "methods/bottleneck.py", "add_bottlenecks",
        "freeze the model, put a bottleneck into each slot"),
    Cut("method", "methods/prefix_tuning.py", "LearnedPrefix.forward",
        "return keys and values of each layer"),
    Cut("method", "methods/prefix_tuning.py", "add_prefix",
        "freeze the model, give it a learned prefix"),
    Cut("dpo", "methods/dpo.py", "preference_loss",
        "compute equation 7 and the implicit rewards of both answers"),
    Cut("dpo", "methods/dpo.py", "measure", "average the loss and what is logged beside it"),
)
# The files that students hand in; everything else a submission gets from the handout.
FRONT = ("lora.py", "model.py", "dataloader.py", "train.py", "generate.py", "configurator.py")


def chosen_parts(where: str, text: str) -> str:
    """Return the names in a list of parts; raises ValueError for an unknown one, or for none."""
    names = text.replace(",", " ").split()
    if unknown := [name for name in names if name not in FIRST + SECOND]:
        raise ValueError(f"{where}: there is no part {unknown[0]!r}; "
                         f"there are {', '.join(FIRST + SECOND)}")
    if not names:
        raise ValueError(f"{where} must name at least one of {', '.join(FIRST + SECOND)}")
    return ",".join(dict.fromkeys(names))


def cuts_of(assigned: str) -> list[Cut]:
    """Return the cuts of the parts in a list such as "lora,training"."""
    return [cut for cut in CUTS if cut.part in assigned.split(",")]


def read_solution(file: str) -> str:
    return (ROOT / file).read_text("utf-8")
