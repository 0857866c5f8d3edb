"""The points of the programming part: each test, what it is worth, and where to look."""

from typing import NamedTuple


class Row(NamedTuple):
    """A test of the autograder: the points of `part`, and the place to look when it fails."""

    number: str
    part: str
    points: float
    visible: bool  # hidden ones show when the grades are published
    title: str
    look: str


RUBRIC = {  # 25 points without the second assignment's
    "construction": Row("1.1", "lora", 1, True, "the layer is an nn.Linear with A and B",
                        "LoRALinear.__init__ in lora.py"),
    "start": Row("1.2", "lora", 2, True, "A and B start as the paper says",
                 "LoRALinear.reset_parameters in lora.py"),
    "forward": Row("1.3", "lora", 3, True, "forward is the base plus the scaled update",
                   "LoRALinear.forward in lora.py"),
    "dropout": Row("1.4", "lora", 2, True, "dropout acts on the input of A, in training only",
                   "LoRALinear.forward in lora.py"),
    "thin": Row("1.5", "lora", 1, True, "forward makes two thin products, no dense update",
                "LoRALinear.forward in lora.py"),
    "merge": Row("1.6", "lora", 3, True, "a parent's eval() merges and its train() restores",
                 "LoRALinear.train in lora.py"),
    "twice": Row("1.7", "lora", 1, True, "a second eval() or train() changes nothing",
                 "LoRALinear.train in lora.py"),
    "cycles": Row("1.8", "lora", 1, False, "merging many times restores every bit of W0",
                  "LoRALinear.train in lora.py"),
    "trainable": Row("2.1", "trainable", 2, True, "exactly the adapters are trainable",
                     "mark_only_lora_as_trainable in lora.py"),
    "attention": Row("3.1", "attention", 2, True, "the attention computes with its adapters",
                     "CausalSelfAttention in model.py"),
    "qkv": Row("3.2", "attention", 1, False, "q, k and v get an update each",
               "CausalSelfAttention in model.py"),
    "friendly": Row("4.1", "training", 2, True, "a step moves the adapters and nothing else",
                    "build_model in methods/build.py, train.py"),
    "labels": Row("5.1", "predict_labels", 2, True, "one label per record, garbage is -1",
                  "predict_labels in generate.py, parse in tasks/base.py"),
    "garbage": Row("5.2", "predict_labels", 1, False, "the accuracy counts garbage as wrong",
                   "score in generate.py, summarize in tasks/scores.py"),
    "prompts": Row("5.3", "predict_labels", 1, True, "the model is asked as it was trained",
                   "predict_labels in generate.py, encode_prompt in dataloader.py"),
    "bitfit": Row("6.1", "method", 2, True, "BitFit trains exactly the biases",
                  "train_biases in methods/bitfit.py"),
    "bottleneck": Row("6.2", "method", 3, True, "a bottleneck adds its network to its input",
                      "Bottleneck and add_bottlenecks in methods/bottleneck.py"),
    "prefix": Row("6.3", "method", 3, True, "a learned prefix stands before the text in each layer",
                  "LearnedPrefix and add_prefix in methods/prefix_tuning.py"),
    "preference": Row("7.1", "dpo", 5, True, "the DPO loss and its rewards",
                      "preference_loss and measure in methods/dpo.py"),
}
