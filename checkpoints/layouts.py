"""How each family of decoders is described and named in a checkpoint of the hub.

A layout translates `config.json` into the fields of the family's config in `model.py` or `models/`,
and back. Every field that would change the mathematics is checked.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = 50256  # GPT-2's
LARGEST = 10**6  # no real model has more tokens, layers or features
LONGEST = 2**24  # float32, in which angles are computed, counts positions exactly up to here
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The hub's description of one family, and its names of tensors."""

    model_types: tuple[str, ...]
    read_shape: Callable[[Fields, str], dict[str, Any]]  # of config.json, and where it is
    describe: Callable[[Fields], dict[str, Any]]  # a shape as config.json
    root: str  # how the names of all tensors but the head's begin
    layers: str  # then a layer's number follows
    embedding: str
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()  # ends of names of tensors that hold no weights
    transposed: tuple[str, ...] = ()  # ends of names of matrices that the hub stores transposed

    def own_name(self, name: str) -> str | None:
        """Return our name of a tensor, None if it holds no weights."""
        if name.endswith(self.ignored):
            return None
        return name if name == self.head else self.root + name.removeprefix(self.root)

    def count_layers(self, names: list[str]) -> int:
        """Return how many layers tensors of these names, as `own_name` gives them, belong to."""
        found = map(re.compile(re.escape(self.layers) + r"(\d+)\.").match, names)
        return len({match[1] for match in found if match})


def whole(hub: Fields, field: str, where: str, default: int | None = None) -> int:
    """Return a size from config.json.

    Raises ValueError unless it is from 1 to `LARGEST`, or `LONGEST` for rotary positions.
    """
    value, most = hub.get(field), LONGEST if field == "max_position_embeddings" else LARGEST
    value = default if value is None else value
    if not (type(value) is int and 1 <= value <= most):
        raise ValueError(f"{where}: config.json needs a whole number from 1 to {most:,} as "
                         f"{field}, not {value!r:.80}")
    return value


def number(
    hub: Fields, field: str, where: str, below: float = 1.0, default: float | None = None
) -> float:
    """Return a positive number below `below` from config.json; raise ValueError otherwise."""
    value = hub.get(field, default)
    if not (type(value) in (int, float) and 0 < value < below):
        raise ValueError(f"{where}: config.json needs a number between 0 and {below:g} as {field}, "
                         f"not {value!r:.80}")
    return value


def refuse_other(hub: Fields, fixed: Fields, where: str, family: str) -> None:
    """Raise ValueError if a field of config.json differs from the only value we compute."""
    for field, allowed in fixed.items():
        if hub.get(field, allowed) != allowed:
            raise ValueError(f"{where}: {field}={hub[field]!r:.80}, but {family} has {allowed!r}")


# GPT-2: names of the sizes on the hub and in GPTConfig.
GPT2_SIZES = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
    "n_head": "n_head", "n_embd": "n_embd",
}
GPT2_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_gpt2(hub: Fields, where: str) -> dict[str, Any]:
    refuse_other(hub, GPT2_FIXED, where, "GPT-2")
    shape: dict[str, Any] = {ours: whole(hub, field, where) for field, ours in GPT2_SIZES.items()}
    if hub.get("n_inner") not in (None, 4 * hub["n_embd"]):
        raise ValueError(f"{where}: n_inner={hub['n_inner']!r:.80}, but GPT-2 has 4 n_embd")
    return shape | {"layer_norm_epsilon": number(hub, "layer_norm_epsilon", where)}


def describe_gpt2(shape: Fields) -> dict[str, Any]:
    return {
        **{field: shape[ours] for field, ours in GPT2_SIZES.items()},
        "layer_norm_epsilon": shape["layer_norm_epsilon"], **GPT2_FIXED, "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape["dropout"]),
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT,
    }


GPT2 = Layout(
    ("gpt2",), read_gpt2, describe_gpt2, root="transformer.", layers="transformer.h.",
    embedding="transformer.wte.weight",
    ignored=(".attn.bias", ".attn.masked_bias"),  # older files store the causal mask
    transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),  # the hub's Conv1D
)

# Llama: names of the sizes on the hub and in LlamaConfig.
LLAMA_SIZES = {
    "max_position_embeddings": "block_size", "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
    "intermediate_size": "mlp_size",
}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_llama(hub: Fields, where: str) -> dict[str, Any]:
    qwen = hub.get("model_type") == "qwen2"
    fixed = {"hidden_act": "silu", "use_sliding_window": False}
    refuse_other(hub, fixed, where, "Qwen2" if qwen else "Llama")
    shape: dict[str, Any] = {ours: whole(hub, field, where) for field, ours in LLAMA_SIZES.items()}
    heads, rope = shape["n_head"], _rope_parameters(hub, where)
    return shape | {
        "n_kv_head": whole(hub, "num_key_value_heads", where, heads),
        "head_size": whole(hub, "head_dim", where, max(shape["n_embd"] // heads, 1)),
        "norm_epsilon": number(hub, "rms_norm_eps", where, default=1e-6),
        "rope_base": number(rope, "rope_theta", where, 1e12, 1e4),
        "rope_scaling": _rope_scaling(rope, where),
        "tied": _flag(hub, "tie_word_embeddings", where),
        "qkv_bias": qwen or _flag(hub, "attention_bias", where),
        "output_bias": not qwen and _flag(hub, "attention_bias", where),
        "mlp_bias": _flag(hub, "mlp_bias", where),
        "end_of_text": _end_of_text(hub, where),
    }


def _rope_parameters(hub: Fields, where: str) -> Fields:
    """Return the fields of the rotary positions, which newer files keep in one place."""
    older, newer = (hub.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if not isinstance(older, dict) or not isinstance(newer, dict):
        parts = [older, newer]
        raise ValueError(f"{where}: config.json needs fields in rope_scaling, not {parts!r:.80}")
    if older and newer and older != newer:  # transformers would ignore the latter
        raise ValueError(f"{where}: rope_scaling and rope_parameters in config.json differ")
    outside = {name: hub[name] for name in ROPE_SCALING[-1:] if name in hub}  # has priority there
    return {"rope_theta": hub.get("rope_theta", 1e4)} | older | newer | outside


def _rope_scaling(rope: Fields, where: str) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: rope_type={kind!r:.80}, but allowed are 'default', 'llama3'")
    if kind == "default":
        return None
    scaling = tuple(float(number(rope, name, where, 1e9)) for name in ROPE_SCALING)
    if scaling[1] >= scaling[2]:
        raise ValueError(f"{where}: low_freq_factor={scaling[1]} must be below "
                         f"high_freq_factor={scaling[2]}")
    return scaling


def _flag(hub: Fields, field: str, where: str) -> bool:
    value = hub.get(field, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: config.json needs true or false as {field}, not {value!r:.80}")
    return value


def _end_of_text(hub: Fields, where: str) -> tuple[int, ...]:
    ends = hub.get("eos_token_id", 2)
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(type(end) is int and 0 <= end < hub["vocab_size"] for end in ends):
        raise ValueError(f"{where}: config.json needs tokens as eos_token_id, not {ends!r:.80}")
    return tuple(ends)


def describe_llama(shape: Fields) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape["rope_base"]}
    if shape["rope_scaling"]:
        *factors, length = shape["rope_scaling"]
        rope |= dict(zip(ROPE_SCALING, (*factors, int(length)), strict=True))
        rope["rope_type"] = "llama3"
    qwen = shape["qkv_bias"] and not shape["output_bias"]
    ends = list(shape["end_of_text"])
    return {
        **{field: shape[ours] for field, ours in LLAMA_SIZES.items()},
        "model_type": "qwen2" if qwen else "llama",
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "num_key_value_heads": shape["n_kv_head"], "head_dim": shape["head_size"],
        "rms_norm_eps": shape["norm_epsilon"], "hidden_act": "silu",
        "rope_theta": shape["rope_base"], "rope_parameters": rope,
        "rope_scaling": rope if shape["rope_scaling"] else None,
        "tie_word_embeddings": shape["tied"], "mlp_bias": shape["mlp_bias"],
        "attention_dropout": shape["dropout"],
        **({} if qwen else {"attention_bias": shape["output_bias"]}),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }


LLAMA = Layout(
    ("llama", "qwen2"), read_llama, describe_llama, root="model.", layers="model.layers.",
    embedding="model.embed_tokens.weight", ignored=("rotary_emb.inv_freq",),
)
LAYOUTS = (GPT2, LLAMA)


def find_layout(hub: Fields, where: str) -> Layout:
    """Return the layout of a checkpoint by its config.json; raise ValueError for other families."""
    kind = hub.get("model_type", "gpt2")  # some old files of GPT-2 do not say it
    for layout in LAYOUTS:
        if kind in layout.model_types:
            return layout
    known = ", ".join(name for layout in LAYOUTS for name in layout.model_types)
    raise ValueError(f"{where}: model_type={kind!r:.80} must be one of {known}")
