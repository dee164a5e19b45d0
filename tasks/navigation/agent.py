"""Agents: roll-outs of a network in the environment, to imitate, to be rewarded and to be evaluated.

ORIST trains with one half of each batch by imitation of the shortest path and with the other by advantage actor-critic,
in the mixture of EnvDrop (NAACL 2019, arXiv 1904.04195).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.core.errors import expect
from tasks.navigation.environment import NavigationEnvironment, Observation
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import SUCCESS_DISTANCE
from tasks.navigation.orist.losses import a2c_loss, discounted_returns, imitation_losses, weighted
from tasks.navigation.orist.network import Memory, Options, ORISTNetwork, Step

DROPPED_SHARE = 0.25  # of a batch must have ended before it is worth leaving them out
SHOWN_OBJECTS = 3
IMITATION_WEIGHT = 0.2


@dataclass
class A2CConfig:
    """Reward and loss of the actor-critic half.

    Args:
        discount: Of rewards per step.
        success_reward: For stopping within 3 m of the goal; its negative for stopping elsewhere.
        progress_reward: For coming closer; its negative for going away.
        entropy_weight: Of the entropy of the policy.
        broadcast: Compare each return with the values of all episodes of the batch, as the official code does by
            mistake; only to reproduce it.
    """

    discount: float = 0.9
    success_reward: float = 2.0
    progress_reward: float = 1.0
    entropy_weight: float = 0.01
    broadcast: bool = False

    def __post_init__(self) -> None:
        expect("a2c.discount", self.discount, 0 <= self.discount <= 1, "a number from 0 to 1")
        for name in ("success_reward", "progress_reward", "entropy_weight"):
            value = getattr(self, name)
            expect(f"a2c.{name}", value, value >= 0, "a number of at least 0")


@dataclass(frozen=True)
class Walk:
    """An evaluated episode: the sum of the log-probabilities of its actions, its trajectory and its steps."""

    log_prob: float
    trajectory: list[list[str | float]] = field(default_factory=list)
    steps: tuple[dict[str, Any], ...] = ()


class _Way(NamedTuple):
    """How a walk may go on: the row it continues and the option it takes, or a walk that is over."""

    log_prob: float
    row: int
    option: int
    over: Walk | None = None


class Agent:
    """Lets a network act in an environment.

    Args:
        network: Judges the options of each step.
        max_actions: Steps after which an episode is over.
        a2c: Reward and loss of `reinforce`.
        avoid_visited: Never go to a viewpoint again in evaluation.
        use_instruction: Let the network read the instruction; without it only ``[CLS]`` is left.
    """

    def __init__(
        self,
        network: ORISTNetwork,
        max_actions: int = 10,
        a2c: A2CConfig | None = None,
        avoid_visited: bool = True,
        use_instruction: bool = True,
    ) -> None:
        self.network = network
        self.max_actions = max_actions
        self.a2c = a2c or A2CConfig()
        self.avoid_visited = avoid_visited
        self.use_instruction = use_instruction

    def judge(self, seen: Observation, memory: Memory | None, attend: bool = False) -> Step:
        """The network's opinion of a step."""
        step: Step = self.network(self._options(seen), memory, attend)
        return step

    def sample(self, log_probs: Tensor, seen: Observation) -> Tensor:
        """Draw options (b,) from the policy (b, C); where an episode begins, option 0 replaces stopping."""
        return torch.multinomial(log_probs.exp(), 1)[:, 0].cpu()

    # -- training ---------------------------------------------------------------------------------------------------

    def imitate(self, env: NavigationEnvironment, episodes: Sequence[Episode]) -> tuple[Tensor, dict[str, Tensor]]:
        """Follow the shortest paths; the loss per episode times 0.2 and the sums of its terms over the steps.

        Where ended episodes are frozen they are left out, which changes no gradient: the official loss adds a constant
        for them (see `imitation_losses`).
        """
        rollout = _Rollout(env, episodes)
        sums: dict[str, Tensor] = {}
        losses = []
        for _ in range(self.max_actions):
            seen = rollout.seen
            step = self.judge(seen, rollout.memory)
            terms = imitation_losses(step, seen)
            terms["progress"] = terms["progress"] * (len(seen.ended) / len(episodes))
            losses.append(weighted(terms))
            sums = {name: sums.get(name, 0.0) + term.detach() for name, term in terms.items()}
            stop = seen.num_options - 1
            if not rollout.go_on(self.network, step, torch.where(seen.teacher < 0, stop, seen.teacher)):
                break
        return IMITATION_WEIGHT * torch.stack(losses).sum() / len(episodes), sums

    def reinforce(self, env: NavigationEnvironment, episodes: Sequence[Episode]) -> Tensor:
        """Follow the policy itself; the actor-critic loss per episode."""
        rollout = _Rollout(env, episodes)
        columns: list[list[Tensor]] = []  # log-probability, entropy, value, reward, live; each (B,)
        for t in range(self.max_actions):
            seen, rows = rollout.seen, rollout.rows
            step = self.judge(seen, rollout.memory)
            log_probs = self._log_probs(step, seen, avoid=False)
            actions = self.sample(log_probs, seen)
            if t == 0:
                actions = torch.where(actions == seen.num_options - 1, 0, actions)
            chosen = log_probs.gather(1, actions.to(log_probs.device)[:, None])[:, 0]
            entropy = -(log_probs.exp() * log_probs.nan_to_num(neginf=0.0)).sum(dim=1)
            going = rollout.go_on(self.network, step, actions)
            reward = self._rewards(seen, rollout.arrived, actions)
            parts = (chosen, entropy, step.value, reward.to(step.value), (~seen.ended).to(step.value))
            columns.append([_in_full(part, rows, len(episodes)) for part in parts])
            if not going:
                break
        log_prob, entropies, values, rewards, live = (torch.stack(column) for column in zip(*columns, strict=True))
        last = torch.zeros_like(values[0])
        if not rollout.seen.ended.all():
            with torch.no_grad():
                value = self.judge(rollout.seen, rollout.memory).value
            unfinished = value.masked_fill(rollout.seen.ended.to(value.device), 0.0)
            last = _in_full(unfinished, rollout.rows, len(episodes))
        returns = discounted_returns(rewards, last, self.a2c.discount)
        return a2c_loss(
            log_prob, entropies, values, returns, live, self.a2c.entropy_weight, broadcast=self.a2c.broadcast
        )

    def _rewards(self, before: Observation, after: Observation, actions: Tensor) -> Tensor:
        """(b,) rewards of live episodes; 0 of others, and where the distance is unknown or the same."""
        stopped = actions == before.num_options - 1
        arrived = torch.where(before.distance < SUCCESS_DISTANCE, 1.0, -1.0) * self.a2c.success_reward
        closer = torch.sign(before.distance - after.distance) * self.a2c.progress_reward
        return torch.where(stopped, arrived, closer).masked_fill(before.ended, 0.0).nan_to_num()

    # -- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def walk(self, env: NavigationEnvironment, episodes: Sequence[Episode], width: int = 1) -> list[Walk]:
        """Follow the most probable walk of each episode, found by a beam search of `width`; 1 is greedy.

        Deterministic: the environment gives the same object to the first option to stop in every evaluation.
        """
        seen, memory = env.reset(episodes), None
        owners = list(range(len(episodes)))  # the episode of each row
        walks = [Walk(0.0) for _ in episodes]
        over: list[list[Walk]] = [[] for _ in episodes]
        for _ in range(self.max_actions):
            step = self.judge(seen, memory, attend=True)
            ways = self._best_ways(self._log_probs(step, seen, self.avoid_visited), seen, walks, owners, over, width)
            over = [[way.over for way in own if way.over] for own in ways]
            taken = [(owner, way) for owner, own in enumerate(ways) for way in own if way.over is None]
            rows = torch.tensor([way.row for _, way in taken])
            option = torch.tensor([way.option for _, way in taken])
            described = _describe(env, seen, step, taken)
            moved = (option < seen.num_options[rows] - 1) & ~(seen.ended[rows] & env.freeze_ended)
            device = step.scores.device
            memory = self.network.remember(
                memory, step, (seen.row_start[rows] + option).to(device), moved.to(device), rows.to(device)
            )
            walks = [
                Walk(way.log_prob, steps=(*walks[way.row].steps, described[i])) for i, (_, way) in enumerate(taken)
            ]
            env = env.select(rows)
            seen = env.step(option)
            owners = [owner for owner, _ in taken]
            ended = seen.ended if env.freeze_ended or seen.ended.all() else torch.zeros_like(seen.ended)
            for row in ended.nonzero()[:, 0].tolist():
                over[owners[row]].append(_finish(walks[row], env, row))
            live = (~ended).nonzero()[:, 0]
            if not len(live):
                owners = []
                break
            if len(live) < len(ended):
                env, memory = env.select(live), _memory_of(memory, live.to(device))
                seen = env.observe()
                walks, owners = [walks[row] for row in live.tolist()], [owners[row] for row in live.tolist()]
        for row, owner in enumerate(owners):  # out of time
            over[owner].append(_finish(walks[row], env, row))
        return [max(found, key=lambda walk: walk.log_prob) for found in over]

    def _best_ways(
        self,
        log_probs: Tensor,
        seen: Observation,
        walks: Sequence[Walk],
        owners: Sequence[int],
        over: Sequence[Sequence[Walk]],
        width: int,
    ) -> list[list[_Way]]:
        """The `width` most probable ways of each episode, walks that are over among them."""
        ways: list[list[_Way]] = [[_Way(walk.log_prob, -1, -1, walk) for walk in found] for found in over]
        table = log_probs.double().cpu().tolist()
        for row, (owner, walk) in enumerate(zip(owners, walks, strict=True)):
            for option in range(int(seen.num_options[row])):
                if (log_prob := table[row][option]) > float("-inf"):
                    ways[owner].append(_Way(walk.log_prob + log_prob, row, option))
        return [sorted(own, key=lambda way: -way.log_prob)[:width] for own in ways]

    # -- shared -----------------------------------------------------------------------------------------------------

    def _options(self, seen: Observation) -> Options:
        like = self.network.r2r_output.weight
        ids, length = seen.input_ids, seen.text_length
        if not self.use_instruction:
            ids, length = ids[:, :1], torch.ones_like(length)
        width = int(length.max())
        return Options(
            ids[:, :width].to(like.device),
            length.to(like.device),
            seen.objects.to(like),
            seen.boxes.to(like),
            seen.num_objects.to(like.device),
            seen.orientation.to(like),
            seen.num_options.to(like.device),
        )

    def _log_probs(self, step: Step, seen: Observation, avoid: bool) -> Tensor:
        """The policy (b, C): log-probabilities of the options, -inf where there is none."""
        device = step.scores.device
        hidden = ~seen.mask | (seen.visited & avoid)
        scores = seen.table(step.scores).masked_fill(hidden.to(device), float("-inf"))
        return scores.log_softmax(dim=1)


class _Rollout:
    """A batch in training. Episodes that ended are left out once they are many, unless they may walk on."""

    def __init__(self, env: NavigationEnvironment, episodes: Sequence[Episode]) -> None:
        self.env = env
        self.seen = env.reset(episodes)
        self.arrived = self.seen  # the same step, before anyone was left out
        self.memory: Memory | None = None
        self.rows = torch.arange(len(episodes))  # of the batch

    def go_on(self, network: ORISTNetwork, step: Step, actions: Tensor) -> bool:
        """Act (b,) and remember; False once all episodes ended."""
        seen, device = self.seen, step.scores.device
        moved = (actions < seen.num_options - 1) & ~(seen.ended & self.env.freeze_ended)
        everyone = torch.arange(len(actions), device=device)
        self.memory = network.remember(
            self.memory, step, (seen.row_start + actions).to(device), moved.to(device), everyone
        )
        self.seen = self.arrived = self.env.step(actions)
        ended = self.seen.ended
        if ended.all():
            return False
        if self.env.freeze_ended and ended.sum() >= DROPPED_SHARE * len(ended):
            live = (~ended).nonzero()[:, 0]
            self.env, self.rows = self.env.select(live), self.rows[live]
            self.memory = _memory_of(self.memory, live.to(device))
            self.seen = self.env.observe()
        return True


def _memory_of(memory: Memory, rows: Tensor) -> Memory:
    return Memory(memory.state[rows], None if memory.cell is None else memory.cell[rows])


def _in_full(part: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Values of some rows of a batch as (B,), 0 elsewhere; differentiable."""
    return part.new_zeros(batch).index_put((rows.to(part.device),), part)


def _finish(walk: Walk, env: NavigationEnvironment, row: int) -> Walk:
    return Walk(walk.log_prob, env.trajectory(row), walk.steps)


def _describe(
    env: NavigationEnvironment, seen: Observation, step: Step, taken: Sequence[tuple[int, _Way]]
) -> list[dict[str, Any]]:
    """What the report shows of each way that is taken: the options, their probabilities, the objects attended to."""
    assert step.attended is not None
    probabilities = seen.table(step.scores).masked_fill(~seen.mask.to(step.scores.device), float("-inf")).softmax(dim=1)
    table, attended = probabilities.cpu().tolist(), step.attended.cpu().tolist()
    viewpoints = env.viewpoints
    described = []
    for _, way in taken:
        options = seen.candidates[way.row]
        labels = seen.labels[way.row][way.option]
        weights = attended[int(seen.row_start[way.row]) + way.option]
        objects = sorted(zip(labels, weights, strict=False), key=lambda pair: -pair[1])[:SHOWN_OBJECTS]
        described.append(
            {
                "viewpoint": viewpoints[way.row],
                "options": list(options),
                "scores": [round(value, 4) for value in table[way.row][: len(options) + 1]],
                "choice": way.option,
                "attended": [[label, round(weight, 4)] for label, weight in objects],
            }
        )
    return described
