"""BitFit, the fine-tuning of biases alone (Ben Zaken et al. 2022, arXiv:2106.10199).

Section 3 writes each layer as `W x + b`; all W stay frozen and all b are trained, those of the
projections as well as those of the norms. Nothing is added: a plain model holds the result.
"""

from torch import nn


def is_bias_name(name: str) -> bool:
    """Tell whether the last component of a parameter's name is `bias`."""
    return name.rpartition(".")[2] == "bias"


def train_biases(model: nn.Module) -> None:
    """Set `requires_grad` on exactly the biases of `model`; raise ValueError if it has none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_bias_name(name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"method=bitfit trains biases, but this {type(model).__name__} has none")
