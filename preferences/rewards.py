"""Reward models: runs of this package that tell how probable it is that a text is positive."""

import math
from collections.abc import Sequence

from dataloader import make_loader
from generate import GenerateConfig, ModelSampler, load_subject, resolve_question
from runtime.device import dtype_name


class RewardModel:
    """The probability of the last label of a classifying run, among its labels, as a reward.

    It reads a text up to its first line end. Raises ValueError unless `folder` holds a run on
    labels, OSError if it holds no run.
    """

    def __init__(self, folder: str, device: str, dtype: str, batch_size: int) -> None:
        config = GenerateConfig(init_from="resume", out_dir=folder, device=device, dtype=dtype)
        self.folder = folder
        subject = load_subject(config)
        question = resolve_question(config, subject.settings, dtype_name(subject.dtype))
        loader = make_loader(question, subject.model.config, subject.tokenizer)
        if not loader.task.choices:
            raise ValueError(f"{folder} is a run of task={question.task}: its answers are no "
                             "labels, so it cannot be a reward model")
        self.sampler = ModelSampler(
            subject.model, loader, subject.dtype, batch_size, max_new_tokens=1)

    def __call__(self, texts: Sequence[str], progress: str = "") -> list[float]:
        """Return the reward of each text, between 0 and 1; equal first lines have equal rewards.

        Raises ValueError if the model cannot read a text as a whole.
        """
        lines = [text.partition("\n")[0] for text in texts]
        unique, loader = list(dict.fromkeys(lines)), self.sampler.loader
        records = [{loader.task.text_field: line} for line in unique]
        if cut := loader.texts_cut(records, self.sampler.room):
            raise ValueError(f"{cut:,} texts do not fit into the {loader.block_size} tokens of the "
                             f"reward model {self.folder}")
        rewards = {}
        for line, prediction in zip(unique, self.sampler.predict(records, progress), strict=True):
            odds = [math.exp(logprob) for logprob in prediction.label_logprobs]
            rewards[line] = odds[-1] / sum(odds)
        return [rewards[line] for line in lines]
