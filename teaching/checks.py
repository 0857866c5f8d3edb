"""The tests of the autograder: what a submission should show, and what to say when it does not.

Each test takes what a probe saw and returns claims, (whether it holds, what was expected). Its
points are divided equally among them. No message holds a right answer in numbers or in code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig
from teaching import model_probes as probes
from teaching.layer_probes import ALPHA, IN, OUT, RANK, draw
from teaching.model_probes import IDS, PREFIX, REVIEWS, SCORED, SHAPE, TOKENS

Claims = list[tuple[bool, str]]
Check = Callable[[dict[str, Any]], Claims]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Enter a function that returns the claims of the rubric's test of its name."""
    CHECKS[function.__name__] = function
    return function


def close(seen: Any, expected: Tensor, tolerance: float = 1e-4) -> bool:
    seen = torch.tensor(seen, dtype=torch.float32)
    return seen.shape == expected.shape and bool(
        ((seen - expected).abs() <= tolerance * (1 + expected.abs())).all())


def update() -> Tensor:
    """The update that the drawn A and B stand for, (out, in)."""
    return ALPHA / RANK * draw("lora_B", OUT, RANK) @ draw("lora_A", RANK, IN)


@check
def construction(seen: dict[str, Any]) -> Claims:
    return [
        (seen["linear"], "Expected a subclass of nn.Linear."),
        (seen["A"] == [RANK, IN], f"Expected lora_A to be (rank, in_features), not {seen['A']}."),
        (seen["B"] == [OUT, RANK], f"Expected lora_B to be (out_features, rank), not {seen['B']}."),
        (seen["merged"] is False, "Expected has_weights_merged to be False at first."),
        (seen["is_lora"] == [True, False], "Expected is_lora() to be True with a rank only."),
        (sorted(seen["plain"]) == ["bias", "weight"] and seen["plain_error"] < 1e-5,
         "Expected a layer of rank 0 to be a plain nn.Linear.")]


@check
def start(seen: dict[str, Any]) -> Claims:
    bound = 64**-0.5  # kaiming-uniform with a = √5 draws from ± 1 / √in_features
    uniform = seen["largest"] <= bound * 1.001 and 0.9 < seen["deviation"] * 3**0.5 / bound < 1.1
    return [
        (seen["B"] == 0, "Expected lora_B to start at zero, so that the update does."),
        (uniform, "Expected lora_A to be drawn from the kaiming-uniform distribution of nn.Linear "
                  "(a=sqrt(5))."),
        (seen["B_again"] == 0, "Expected reset_parameters() to set lora_B to zero again."),
        (seen["A_again"] > 0, "Expected reset_parameters() to draw lora_A again.")]


@check
def forward(seen: dict[str, Any]) -> Claims:
    weight, bias = draw("weight", OUT, IN) + update(), draw("bias", OUT)
    text = "Expected the base output plus the scaled update"
    return [
        (close(seen["y"], F.linear(draw("x", 5, IN), weight, bias)),
         f"{text} for an input (batch, features); check the order of the products and alpha."),
        (close(seen["y3"], F.linear(draw("x3", 2, 3, IN), weight, bias)),
         f"{text} for an input (batch, tokens, features)."),
        (close(seen["unbiased"], F.linear(draw("x", 5, IN), weight)), f"{text} without a bias."),
    ]


@check
def dropout(seen: dict[str, Any]) -> Claims:
    base = F.linear(draw("x", 64, IN), draw("weight", OUT, IN), torch.zeros(OUT))
    sums = torch.tensor(seen["sums"]).abs()  # (64, out)
    same = bool((sums == sums[:, :1]).all())
    between = bool(((sums > 0) & (sums < 2 * IN)).any())
    return [
        (close(seen["base"], base), "Expected the base product to see its whole input in training: "
                                    "dropout belongs to the update alone."),
        (same and between, "Expected dropout on the input of A, feature by feature."),
        (same and bool((sums % 2 == 0).all()) and len(sums.unique()) > 2,
         "Expected what dropout keeps to be scaled by 1 / (1 - p), as nn.Dropout does."),
        (close(seen["calm"], torch.full((64, OUT), float(IN))),
         "Expected no dropout in evaluation mode."),
    ]


@check
def thin(seen: dict[str, Any]) -> Claims:
    return [(seen["largest"] < 30 * 60,
             "Expected no matrix of the weight's size in forward: multiply by A, then by B.")]


@check
def merge(seen: dict[str, Any]) -> Claims:
    """A wrong forward has a test of its own: what it computes may be merged as well."""
    weight, bias, x = draw("weight", OUT, IN), draw("bias", OUT), draw("x", 5, IN)
    merged = (weight + update(), torch.tensor(seen["computed"]))
    outputs = (F.linear(x, merged[0], bias), torch.tensor(seen["y_before"]))
    return [
        (seen["merged"] is True, "Expected has_weights_merged after eval() of a model around the "
                                 "layer. Which method does a parent call on its children?"),
        (any(close(seen["weight"], each) for each in merged),
         "Expected the weight to hold the scaled update after eval() of a model around the layer."),
        (any(close(seen["y"], each) for each in outputs),
         "Expected the same output in evaluation mode as in training mode."),
        (seen["demerged"] is True and close(seen["restored"], weight),
         "Expected train() of a model around the layer to take the update out again."),
        (close(seen["y_again"], outputs[1]), "Expected the same output after train() as before."),
        (all(seen["returned"]), "Expected eval() and train() to return the layer or the model."),
    ]


@check
def twice(seen: dict[str, Any]) -> Claims:
    return [(close(seen[f"{mode}2"], torch.tensor(seen[f"{mode}1"])),
             f"Expected a second {mode}() to leave the weight as the first one left it.")
            for mode in ("eval", "train")]


@check
def cycles(seen: dict[str, Any]) -> Claims:
    return [(error == 0, f"Expected every bit of the weight back after merging in {dtype}; "
                         "rounding errors add up.") for dtype, error in seen.items()]


@check
def trainable(seen: dict[str, Any]) -> Claims:
    right = {"inner.lora_A", "inner.lora_B"}
    found = set(seen["from_True"]) | set(seen["from_False"])
    return [
        (right <= set(seen["from_False"]), "Expected lora_A and lora_B to require gradients, also "
                                           "where they were frozen before."),
        (not {"inner.weight", "inner.bias"} & found, "Expected the base's weight and bias frozen."),
        (found <= {*right, "inner.weight", "inner.bias"},
         "Expected nothing else to be trained because its name holds the letters lora."),
    ]


def reference_logits(computed: Mapping[str, Any]) -> Tensor:
    """Return the logits of GPT-2 with the drawn weights, but for the matrices `computed`."""
    model = probes.make_gpt(_Reference, 0)
    weights = {f"{name}.weight": torch.tensor(matrix) for name, matrix in computed.items()}
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(torch.tensor(IDS))[0][:, -1]


class _Reference:
    class model:  # noqa: N801  (a module's place)
        GPT, GPTConfig = GPT, GPTConfig


@check
def attention(seen: dict[str, Any]) -> Claims:
    blocks = [f"transformer.h.{layer}.attn.c_attn" for layer in range(SHAPE["n_layer"])]
    wanted = {f"{block}.{leaf}" for block in blocks for leaf in ("lora_A", "lora_B")}
    return [
        (wanted <= set(seen["adapters"]), "Expected c_attn of every block to have an adapter."),
        (set(blocks) <= seen["computed"].keys()
         and close(seen["logits"], reference_logits(seen["computed"]), 1e-3),
         "Expected the model's logits to be those of its adapted projections: call the layers, do "
         "not use their weights."),
        (not seen["plain_adapters"] and close(seen["plain"], reference_logits({}), 1e-3),
         "Expected a model of lora_rank=0 to be plain GPT-2."),
    ]


@check
def qkv(seen: dict[str, Any]) -> Claims:
    updates = [torch.tensor(update).chunk(3) for update in seen.values()]
    sizes = [[part.abs().max() for part in parts] for parts in updates]
    # Two updates from one B share their columns: side by side they have the rank of one alone.
    pairs = [torch.cat(pair, dim=1) for q, k, v in updates for pair in ((q, k), (k, v), (q, v))]
    ranks = [int(torch.linalg.matrix_rank(pair, rtol=1e-4)) for pair in pairs]
    return [
        (bool(sizes) and min(map(min, sizes)) > 1e-3,
         "Expected each of q, k and v to get an update from its adapter."),
        (bool(ranks) and min(ranks) > RANK,
         "Expected q, k and v to have rows of B of their own, not the same for all."),
    ]


@check
def friendly(seen: dict[str, Any]) -> Claims:
    adapters = [name for name in seen["names"] if probes.is_adapter(name)]
    return [
        (bool(adapters) and sorted(seen["trained"]) == sorted(adapters),
         "Expected a model for LoRA whose adapters, and nothing else, require gradients."),
        (bool(adapters) and sorted(seen["moved"]) == sorted(adapters),
         "Expected one optimizer step to move every adapter and nothing else."),
        (seen["full"] is True, "Expected lora_rank=0 to train all weights."),
    ]


@check
def labels(seen: dict[str, Any]) -> Claims:
    right, found = [label for *_, label in REVIEWS], seen["labels"]
    if len(found) != len(right):
        return [(False, f"Expected one label for each of {len(right)} records, not {len(found)}.")]
    texts = {label: [i for i, (_, _, own) in enumerate(REVIEWS) if own == label]
             for label in (0, 1, -1)}
    unsure = [i for i in texts[-1] if {"positive", "negative"} <= set(REVIEWS[i][1].split())]
    inside = [i for i in texts[-1] if "itive" in REVIEWS[i][1] or "ative" in REVIEWS[i][1]]
    inside = [i for i in inside if i not in unsure]

    def agree(rows: Sequence[int]) -> bool:
        return all(found[i] == right[i] for i in rows)

    return [
        (agree(texts[0] + texts[1]), "Expected a label word, in any case, to be its label."),
        (agree(unsure), "Expected an answer with both label words to be garbage."),
        (agree(inside), "Expected a label inside another word to be garbage."),
        (agree([i for i in texts[-1] if i not in unsure + inside]),
         "Expected an answer without a label word to be garbage, -1."),
    ]


@check
def garbage(seen: dict[str, Any]) -> Claims:
    return [(seen["n"] == len(SCORED) and abs(seen["accuracy"] - 2 / len(SCORED)) < 1e-9,
             "Expected the share of right answers among all records: garbage counts as wrong.")]


@check
def prompts(seen: dict[str, Any]) -> Claims:
    return [(seen["asked"] == seen["trained"],
             "Expected the model to be asked each record once, with exactly the tokens that stand "
             "before the answer in training.")]


@check
def bitfit(seen: dict[str, Any]) -> Claims:
    return [(sorted(seen["trained"]) == ["0.bias", "1.bias"],
             "Expected every bias, by the last part of its name, and nothing else.")]


@check
def bottleneck(seen: dict[str, Any]) -> Claims:
    x = draw("x", 4, 6)
    down = F.linear(x, draw("down.weight", 3, 6), draw("down.bias", 3))
    y = x + F.linear(F.gelu(down), draw("up.weight", 6, 3), draw("up.bias", 6))
    return [
        (seen["shapes"] == [[3], [3, 6], [6], [6, 3]], "Expected two layers with their biases."),
        (seen["started"] < 1e-3, "Expected a new bottleneck to change next to nothing."),
        (close(seen["y"], y), "Expected the input plus the network's output."),
        (all(close(end, y) for end in seen["ends"]),
         "Expected a bottleneck behind each sub-layer of each block."),
        (trains_only(seen["trained"], "bottleneck"),
         "Expected the bottlenecks to be trained and everything else to be frozen."),
    ]


def trains_only(names: Sequence[str], word: str) -> bool:
    """Tell whether parameters are trained, and only those of modules called `word`."""
    return bool(names) and all(word in name.split(".") for name in names)


def same_pairs(seen: Sequence[Sequence[Any]], flat: Tensor) -> bool:
    """Tell whether the pairs are keys and values of `flat` (P, 2·L·K·D), layer by layer."""
    parts = flat.reshape(len(flat), *PREFIX).permute(1, 2, 0, 3).unsqueeze(1)  # (2L, 1, K, P, D)
    found = [tensor for pair in seen for tensor in pair]
    return len(found) == len(parts) and all(map(close, found, parts))


@check
def prefix(seen: dict[str, Any]) -> Claims:
    ids = seen["asked"][-1][0] if seen["asked"] else []
    return [
        (same_pairs(seen["plain"], draw("prefix", TOKENS, math.prod(PREFIX))),
         "Expected a key and a value (1, heads, positions, features) for each layer, from the "
         "numbers of each position in the order of the docstring."),
        (same_pairs(seen["network"], torch.tensor(seen["flat"])),
         "Expected the network's output where the prefix has a network."),
        (len(ids) == TOKENS and same_pairs(seen["start"], probes.table()[ids]),
         "Expected the prefix to start as the keys and values that the model computes for tokens."),
        (trains_only(seen["trained"], "learned_prefix"),
         "Expected the prefix to be trained and everything else to be frozen."),
        (seen["counted"] == TOKENS, "Expected prefix_tokens of the model's config to be set."),
    ]


@check
def preference(seen: dict[str, Any]) -> Claims:
    chosen, rejected = (0.5 * (draw("policy", 6) - draw("reference", 6))).chunk(2)
    margin = chosen - rejected
    plain, swapped = F.softplus(-margin), F.softplus(margin)
    return [
        (close(seen["losses_0.0"], plain), "Expected equation 7 for each pair."),
        (close(seen["losses_0.1"], 0.9 * plain + 0.1 * swapped),
         "Expected label smoothing to weigh both orders."),
        (close(seen["chosen"], chosen) and close(seen["rejected"], rejected),
         "Expected the implicit rewards, scaled by beta."),
        *measure_claims(seen["logged"], margin, chosen, rejected),
    ]


def measure_claims(
    logged: Mapping[str, float], margin: Tensor, chosen: Tensor, rejected: Tensor
) -> Claims:
    loss = 0.9 * F.softplus(-margin) + 0.1 * F.softplus(margin)
    likely, unlikely = draw("policy", 6).chunk(2)
    expected = {
        "reward_accuracy": (margin > 0).float(), "chosen_reward": chosen,
        "rejected_reward": rejected, "margin": margin, "gradient_weight": (-margin).sigmoid() - 0.1,
        "chosen_log_prob": likely, "rejected_log_prob": unlikely,
        "kl_estimate": draw("reference", 6) - draw("policy", 6)}
    return [
        (close(logged["loss"], loss.mean()), "Expected measure() to average the loss over pairs."),
        (all(close(logged[name], value.mean()) for name, value in expected.items()),
         "Expected the averages that Measures describes."),
    ]
