"""What ORIST learns from: imitation of the shortest path with four auxiliary tasks, and actor-critic (A2C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.navigation.environment import ENDED, Observation
from tasks.navigation.orist.network import Step
from tasks.navigation.rooms import UNLABELLED

ROOM_WEIGHT = 0.2


def imitation_losses(step: Step, seen: Observation, progress: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of one step, whose sum by `weighted` is its loss; all targets come with the observation.

    `action` is a sum over the episodes, the others are means: `direction` over options, `next_room` and `target_room`
    over labelled episodes, `progress` over all. As in the official code the target of ended episodes' progress is what
    they predict, which adds to the value of the loss and nothing to its gradient. `progress` (B,) replaces the targets.
    """
    device = step.scores.device
    scores = seen.table(step.scores).masked_fill(~seen.mask.to(device), float("-inf"))
    goal = (seen.progress if progress is None else progress).to(step.progress)
    own = step.progress.detach().sigmoid()
    return {
        "action": F.cross_entropy(scores, seen.teacher.to(device), ignore_index=ENDED, reduction="sum"),
        "progress": F.binary_cross_entropy_with_logits(step.progress, torch.where(seen.ended.to(device), own, goal)),
        "direction": _mean_cross_entropy(step.direction, seen.direction.to(device)),
        "next_room": _mean_cross_entropy(step.next_room, seen.next_room.to(device)),
        "target_room": _mean_cross_entropy(step.target_room, seen.target_room.to(device)),
    }


def weighted(terms: dict[str, Tensor]) -> Tensor:
    """The loss of one step: the sum of its terms, those about rooms by 0.2."""
    return torch.stack([ROOM_WEIGHT * term if "_room" in name else term for name, term in terms.items()]).sum()


def room_presence_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the rooms around options, both (B, C, R) and padded, as the official code has it.

    There probabilities are taken for logits, and what pads them counts. No published model was trained with it.
    """
    return F.binary_cross_entropy_with_logits(probabilities, targets)


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the labelled; 0 if none is."""
    total = F.cross_entropy(logits, targets, ignore_index=UNLABELLED, reduction="sum")
    return total / (targets != UNLABELLED).sum().clamp(min=1)


def discounted_returns(rewards: Tensor, last_value: Tensor, discount: float) -> Tensor:
    """Returns (T, B) of rewards (T, B), followed by `last_value` (B,)."""
    returns, following = [], last_value
    for reward in rewards.flip(0):
        following = reward + discount * following
        returns.append(following)
    return torch.stack(returns[::-1])


def a2c_loss(
    log_probs: Tensor,
    entropies: Tensor,
    values: Tensor,
    returns: Tensor,
    live: Tensor,
    entropy_weight: float = 0.01,
    broadcast: bool = False,
) -> Tensor:
    """Advantage actor-critic over steps and episodes, all (T, B): policy, half squared error of the value, entropy.

    Terms are summed over the live, divided by their number and by B. The official code has the values as a column
    beside returns in a row, so that every return is compared with the values of all episodes of the batch; `broadcast`
    does that too.
    """
    if broadcast:
        difference = returns[:, None, :] - values[:, :, None]  # (T, B, B)
        log_probs, mask = log_probs[:, None, :], live[:, None, :]
    else:
        difference, mask = returns - values, live
    policy = -(log_probs * difference.detach() * mask).sum()
    critic = 0.5 * (difference**2 * mask).sum()
    entropy = (entropies * live).sum()
    return (policy + critic - entropy_weight * entropy) / live.sum().clamp(min=1) / live.shape[1]
