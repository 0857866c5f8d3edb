"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

A prompt x has a chosen answer y_w and a rejected one y_l. The implicit reward of an answer is how
much likelier than the frozen reference the model makes it, times β (section 4, below equation 7):

    r(x, y) = β · [log π(y | x) − log π_ref(y | x)]
    loss    = −log σ(m),  m = r(x, y_w) − r(x, y_l)                                  (equation 7)

Its gradient is −σ(−m) · β · [∇ log π(y_w | x) − ∇ log π(y_l | x)]: pairs in the wrong order weigh
most. Label smoothing ε takes that share of the labels for wrong (conservative DPO, Mitchell 2023):
loss = −(1 − ε) · log σ(m) − ε · log σ(−m).
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from configurator import Bounds

PreferenceLoss = Literal["dpo", "supervised"]


@dataclass(frozen=True)
class PreferenceConfig:
    """Settings of a task whose answers come in pairs, a chosen and a rejected one."""

    preference_loss: Annotated[
        PreferenceLoss, "with task=preferences; supervised trains on the chosen answers alone"
    ] = "dpo"
    beta: Annotated[float, "DPO's pull towards the reference model", Bounds(1e-4)] = 0.1
    label_smoothing: Annotated[float, "DPO's share of wrong labels", Bounds(0, 0.5)] = 0.0


class Measures(NamedTuple):
    """What training logs, each the mean over the pairs; log-probabilities are in nats."""

    loss: Tensor
    reward_accuracy: Tensor  # share of pairs whose chosen answer has the larger implicit reward
    chosen_reward: Tensor
    rejected_reward: Tensor
    margin: Tensor  # m
    gradient_weight: Tensor  # −d loss / d m: σ(−m), or less with label smoothing
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    # mean of log π_ref(y) − log π(y): estimates KL(π_ref‖π) where the reference sampled the answers
    kl_estimate: Tensor


def preference_loss(
    log_probs: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (n,) and the rewards (n,) of the chosen and of the rejected answers.

    `log_probs` and `reference` (2n,) hold the log-probability of each whole answer, those of the n
    chosen ones first. Raises ValueError unless they do.
    """
    if log_probs.shape != reference.shape or log_probs.dim() != 1 or len(log_probs) % 2:
        raise ValueError(f"log-probabilities of pairs: {tuple(log_probs.shape)} under the model, "
                         f"{tuple(reference.shape)} under the reference")
    chosen, rejected = (beta * (log_probs - reference)).chunk(2)  # each (n,)
    margin = chosen - rejected
    losses = (-(1 - label_smoothing) * F.logsigmoid(margin)
              - label_smoothing * F.logsigmoid(-margin))
    return losses, chosen.detach(), rejected.detach()


def measure(log_probs: Tensor, reference: Tensor, config: PreferenceConfig) -> Measures:
    """Return the loss, differentiable, and what is logged beside it; as `preference_loss`."""
    losses, chosen, rejected = preference_loss(
        log_probs, reference, config.beta, config.label_smoothing)
    margin, (likely, unlikely) = chosen - rejected, log_probs.detach().chunk(2)
    weight = (-margin).sigmoid().mean() - config.label_smoothing  # σ(−m) − ε
    return Measures(
        losses.mean(), (margin > 0).float().mean(), chosen.mean(), rejected.mean(), margin.mean(),
        weight, likely.mean(), unlikely.mean(),
        -(chosen + rejected).mean() / (2 * config.beta))
