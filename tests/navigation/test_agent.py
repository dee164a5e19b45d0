"""Roll-outs: imitation, actor-critic, greedy walks and beam search in generated houses."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tasks.core.errors import UserError
from tasks.navigation.agent import A2CConfig, Agent
from tasks.navigation.orist.network import ORISTNetwork


def make_network(data, seed=0):
    torch.manual_seed(seed)
    network = ORISTNetwork(
        data.vocab_size,
        data.feature_dim,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        feedforward_dim=24,
        max_positions=40,
        dropout=0.0,
        attention_dropout=0.0,
        feature_dropout=0.0,
    )
    network.r2r_output.weight.data.mul_(20)  # opinions differ
    return network.double().eval()


@pytest.fixture(scope="module")
def network(house_data):
    return make_network(house_data)


@pytest.fixture(scope="module")
def episodes(house_data):
    """Of different lengths and houses."""
    return [*house_data.samples("train")[::17][:4], *house_data.samples("val_unseen")[::25][:2]]


def grads(network):
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_imitation_follows_the_shortest_paths(house_data, network, episodes):
    env = house_data.environment(freeze_ended=False)  # of which nobody is left out
    loss, terms = Agent(network).imitate(env, episodes)
    for row, episode in enumerate(episodes):
        nodes = [pose[0] for pose in env.trajectory(row)]
        nodes = [node for node, _ in itertools.groupby(nodes)]
        assert nodes == house_data.graphs[episode.scan].shortest_path(episode.start, episode.goal)
    parts = sum((0.2 if "room" in name else 1.0) * value for name, value in terms.items())
    torch.testing.assert_close(loss, 0.2 * parts / len(episodes))


def test_leaving_out_ended_episodes_changes_no_gradient(house_data, network, episodes):
    found = []
    for freeze_ended in (True, False):
        network.zero_grad()
        loss, terms = Agent(network).imitate(house_data.environment(freeze_ended=freeze_ended), episodes)
        loss.backward()
        found.append((grads(network), {name: value for name, value in terms.items() if name != "progress"}))
    (frozen, terms), (official, official_terms) = found
    assert len({len(episode.path) for episode in episodes}) > 1
    torch.testing.assert_close(frozen, official)
    torch.testing.assert_close(terms, official_terms)


class Scripted(Agent):
    """An agent whose samples are given."""

    script: list

    def sample(self, log_probs, seen):
        return self.script.pop(0)[: len(seen.num_options)]


def test_rewards_are_for_coming_closer_and_stopping_near(house_data, network, episodes):
    episode = episodes[0]
    env = house_data.environment()
    agent = Scripted(network, max_actions=4)
    path = house_data.graphs[episode.scan].shortest_path(episode.start, episode.goal)
    seen = env.reset([episode])
    there = seen.candidates[0].index(path[1])
    after = env.step([there])
    assert agent._rewards(seen, after, torch.tensor([there])).tolist() == [1.0]
    back = after.candidates[0].index(path[0])
    again = env.step([back])
    assert agent._rewards(after, again, torch.tensor([back])).tolist() == [-1.0]
    stop = again.num_options - 1
    over = env.step(stop)
    assert agent._rewards(again, over, stop).tolist() == [-2.0]
    assert agent._rewards(over, env.step(stop), stop).tolist() == [0.0]  # nothing for who has stopped
    near = env.reset([dataclasses.replace(episode, path=(episode.goal,))])
    assert agent._rewards(near, env.step(near.num_options - 1), near.num_options - 1).tolist() == [2.0]


def test_actor_critic_is_that_of_the_formula(house_data, network, episodes):
    """One episode that is not over after two steps, by hand."""
    episode = episodes[0]
    agent = Scripted(network, max_actions=2, a2c=A2CConfig(discount=0.5, entropy_weight=0.1))
    agent.script = [torch.tensor([10**6]), torch.tensor([0])]
    env = house_data.environment()
    first = env.reset([episode])
    agent.script[0] = first.num_options - 1  # stopping at once becomes option 0
    loss = agent.reinforce(house_data.environment(), [episode])

    values, log_probs, entropies, rewards, memory, seen = [], [], [], [], None, first
    for _ in range(2):
        step = agent.judge(seen, memory)
        policy = step.scores.softmax(dim=0)
        log_probs.append(policy[0].log())
        entropies.append(-(policy * policy.log()).sum())
        values.append(step.value[0])
        memory = step.memory
        after = env.step([0])
        rewards.append(float(np.sign(seen.distance - after.distance)))
        seen = after
    last = agent.judge(seen, memory).value[0].detach()
    returns = [rewards[0] + 0.5 * (rewards[1] + 0.5 * last), rewards[1] + 0.5 * last]
    expected = sum(
        -log_prob * (r - value).detach() + 0.5 * (r - value) ** 2 - 0.1 * entropy
        for log_prob, r, value, entropy in zip(log_probs, returns, values, entropies, strict=True)
    )
    torch.testing.assert_close(loss, expected / 2)


class Firm(Agent):
    """An agent that samples what is most probable."""

    def sample(self, log_probs, seen):
        return log_probs.argmax(dim=1)


def test_leaving_out_ended_episodes_changes_no_actor_critic_loss(house_data, network, episodes, monkeypatch):
    found = []
    for share in (0.01, 2.0):
        monkeypatch.setattr("tasks.navigation.agent.DROPPED_SHARE", share)
        network.zero_grad()
        loss = Firm(network, max_actions=6).reinforce(house_data.environment(), episodes)
        loss.backward()
        found.append((loss, grads(network)))
    torch.testing.assert_close(*found)


def test_walks_are_deterministic_and_do_not_depend_on_other_episodes(house_data, network, episodes):
    agent = Agent(network, max_actions=6)
    together = agent.walk(house_data.environment(), episodes)
    assert together == agent.walk(house_data.environment(), episodes)
    for episode, walk in zip(episodes, together, strict=True):
        alone = agent.walk(house_data.environment(), [episode])[0]
        assert alone.trajectory == walk.trajectory
        assert alone.log_prob == pytest.approx(walk.log_prob)
        assert [step["choice"] for step in alone.steps] == [step["choice"] for step in walk.steps]


class Restless(Agent):
    """An agent that stops only where it can do nothing else."""

    def judge(self, seen, memory, attend=False):
        step = super().judge(seen, memory, attend)
        stop = seen.row_start + seen.num_options - 1
        return dataclasses.replace(step, scores=step.scores.index_fill(0, stop, -1e3))


def test_walks_visit_no_viewpoint_twice_unless_they_may(house_data, network, episodes):
    def repeats(agent):
        visited = [
            [step["viewpoint"] for step in walk.steps] for walk in agent.walk(house_data.environment(), episodes)
        ]
        return sum(len(nodes) - len(set(nodes)) for nodes in visited)

    assert repeats(Restless(network, max_actions=8)) == 0
    assert repeats(Restless(network, max_actions=8, avoid_visited=False)) > 0


def test_steps_say_what_was_chosen_among_what(house_data, network, episodes):
    walk = Agent(network, max_actions=5).walk(house_data.environment(), episodes[:1])[0]
    graph = house_data.graphs[episodes[0].scan]
    for step, following in itertools.zip_longest(walk.steps, walk.steps[1:]):
        assert set(step["options"]) == {
            graph.viewpoints[n] for n in np.flatnonzero(graph.edges[graph.number(step["viewpoint"])])
        }
        assert len(step["scores"]) == len(step["options"]) + 1
        assert sum(step["scores"]) == pytest.approx(1, abs=1e-3)
        if following:
            assert following["viewpoint"] == step["options"][step["choice"]]
        assert all(0 <= weight <= 1 for _, weight in step["attended"])


def every_walk(agent, data, episode, max_actions):
    """Log-probability of every sequence of options."""
    found = {}

    def extend(actions, log_prob):
        env, memory = data.environment(), None
        seen = env.reset([episode])
        for action in actions:
            step = agent.judge(seen, memory)
            memory = step.memory
            stopped = action == int(seen.num_options) - 1
            seen = env.step([action])
            if stopped:
                break
        else:
            stopped = False
        if stopped or len(actions) == max_actions:
            found[tuple(actions)] = log_prob
            return
        log_probs = agent._log_probs(agent.judge(seen, memory), seen, avoid=True)[0].double().tolist()
        for option, value in enumerate(log_probs):
            if value > float("-inf"):
                extend([*actions, option], log_prob + value)

    with torch.no_grad():
        extend([], 0.0)
    return found


def test_a_wide_beam_finds_the_most_probable_walk(house_data, network, episodes):
    agent = Agent(network, max_actions=3)
    narrow = agent.walk(house_data.environment(), episodes[:2])
    wide = agent.walk(house_data.environment(), episodes[:2], width=200)
    for episode, greedy, best in zip(episodes, narrow, wide, strict=False):
        walks = every_walk(agent, house_data, episode, 3)
        actions = tuple(step["choice"] for step in best.steps)
        assert best.log_prob == pytest.approx(max(walks.values()))
        assert walks[actions] == pytest.approx(best.log_prob)
        assert greedy.log_prob <= best.log_prob + 1e-12


def test_a_blind_agent_reads_nothing(house_data, network, episodes):
    other = [dataclasses.replace(e, tokens=(e.tokens[0], *reversed(e.tokens[1:-1]), e.tokens[-1])) for e in episodes]
    trajectories = {}
    for use_instruction in (True, False):
        agent = Agent(network, max_actions=4, use_instruction=use_instruction)
        trajectories[use_instruction] = [
            [walk.log_prob for walk in agent.walk(house_data.environment(), batch)] for batch in (episodes, other)
        ]
    assert trajectories[False][0] == trajectories[False][1]
    assert trajectories[True][0] != trajectories[True][1]


def test_actor_critic_options_are_checked():
    with pytest.raises(UserError, match=r"a2c\.discount"):
        A2CConfig(discount=1.5)
    with pytest.raises(UserError, match=r"a2c\.success_reward"):
        A2CConfig(success_reward=-1.0)
