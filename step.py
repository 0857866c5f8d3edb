"""One optimizer step, and one validation: on all processes, exact however batches are cut."""

import torch
from torch import Tensor, nn

import devices
from batches import Batch
from devices import autocast
from model import GPT


class SharedPrefix:
    """Keys and values of a prefix that batches share: it runs once, and is differentiated once.

    The batches add up their gradients in `past`; `backward` takes the sum on to the adapters.
    """

    def __init__(self, model: GPT, prefix: Tensor) -> None:
        made = model.prefill(prefix.to(model.device))
        self.made = [tensor for pair in made for tensor in pair]
        self.leaves = [self._leaf(tensor) for tensor in self.made]
        self.past = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))

    @staticmethod
    def _leaf(made: Tensor) -> Tensor:
        leaf = made.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        leaf.requires_grad = made.requires_grad
        leaf.grad = torch.zeros_like(leaf) if made.requires_grad else None
        return leaf

    def backward(self) -> None:
        pairs = [(made, leaf.grad.to(made.dtype))
                 for made, leaf in zip(self.made, self.leaves, strict=True) if made.requires_grad]
        if pairs:  # none without a prefix, or where no adapter acts on keys and values
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)


def train_step(
    model: GPT, batches: list[Batch], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, grad_clip: float, dtype: torch.dtype,
) -> float:
    """Take one optimizer step on a window of batches; return its loss in nats a token.

    The loss is the sum over the supervised tokens of the whole window, on all ranks, over their
    number, so that it does not depend on how the window is cut into batches.
    """
    supervised = sum(batch.supervised_tokens for batch in batches)
    losses = torch.zeros(len(batches), device=model.device)
    with autocast(model.device, dtype):
        prefix = SharedPrefix(model, batches[0].prefix)
    for i in devices.own_share(range(len(batches))):
        with autocast(model.device, dtype):
            batch = batches[i].to(model.device)
            _, loss = model(batch.inputs, batch.targets, prefix.past)
            loss = loss * (batch.supervised_tokens / supervised)
        scaler.scale(loss).backward()
        losses[i] = loss.detach()
    prefix.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    devices.sum_over_ranks([losses, *(parameter.grad for parameter in trained)])
    if not losses.isfinite().all():
        i = losses.isfinite().logical_not().nonzero()[0].item()
        raise FloatingPointError(f"the loss of batch {i + 1} of {len(batches)} is {losses[i]:g}")
    scaler.unscale_(optimizer)
    if grad_clip:
        nn.utils.clip_grad_norm_(trained, grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # in place: new ones would lie scattered in memory
    return losses.sum().item()


@torch.no_grad()
def validation_loss(model: GPT, batches: list[Batch], dtype: torch.dtype) -> float:
    """Return the mean loss in nats over the supervised tokens of fixed batches, on all ranks."""
    model.eval()
    total = torch.zeros((), device=model.device)
    with autocast(model.device, dtype):
        past = model.prefill(batches[0].prefix.to(model.device))
        for batch in devices.own_share(batches):
            batch = batch.to(model.device)
            _, loss = model(batch.inputs, batch.targets, past)
            total += loss * batch.supervised_tokens
    devices.sum_over_ranks([total])
    model.train()
    return total.item() / sum(batch.supervised_tokens for batch in batches)
