"""R2R's own validation splits, where FRUGAL_DATA names a folder with r2r/."""

import os
from pathlib import Path

import numpy as np
import pytest

from tasks.navigation.check import problem_of_path
from tasks.navigation.data import R2R
from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.evaluators import R2REvaluator
from tasks.navigation.features import NoObjects
from tasks.navigation.simulator import Simulator
from tasks.navigation.world import World

ROOT = Path(os.environ.get("FRUGAL_DATA", "nowhere")) / "r2r"
pytestmark = pytest.mark.skipif(not (ROOT / "R2R_val_unseen.json").is_file(), reason="FRUGAL_DATA names no r2r/")


@pytest.fixture(scope="module")
def data():
    return R2R(str(ROOT))


@pytest.fixture(scope="module")
def episodes(data):
    return data.read(data.annotation("val_unseen"), "val_unseen")


def test_all_paths_of_val_unseen_can_be_walked(data, episodes):
    assert len(episodes) == 2349
    assert len({episode.scan for episode in episodes}) == 11
    assert [problem_of_path(data.graphs[episode.scan], episode) for episode in episodes] == [None] * 2349
    paths = {episode.path: episode for episode in episodes}.values()
    longer = [e for e in paths if data.graphs[e.scan].shortest_path(e.start, e.goal) != list(e.path)]
    assert len(longer) == 8  # of 783, as known of this split


def test_agents_on_shortest_paths_always_arrive(data, episodes):
    """Official figures of the shortest-path agent: SR 1, TL 9.48 m; each of its moves is one the simulator allows."""
    environment = NavigationEnvironment(World(data.graphs, NoObjects()))
    seen = environment.reset(episodes)
    while not seen.ended.all():
        seen = environment.step(seen.teacher)
    records = {episode.id: {"trajectory": environment.trajectory(row)} for row, episode in enumerate(episodes)}
    figures = R2REvaluator(episodes, data.graphs).evaluate(records).summary
    assert figures["SR"] == figures["OSR"] == figures["SPL"] == 1.0
    assert figures["NE"] == 0.0
    assert round(figures["TL"], 2) == 9.48
    simulator = Simulator(data.graphs)
    simulator.new_episodes(*zip(*((e.scan, e.start, e.heading, 0.0) for e in episodes), strict=True))
    for step in range(1, max(len(record["trajectory"]) for record in records.values())):
        rows = [record["trajectory"][min(step, len(record["trajectory"]) - 1)] for record in records.values()]
        target = np.array([data.graphs[e.scan].index[row[0]] for e, row in zip(episodes, rows, strict=True)])
        moving = target != simulator.number
        allowed = simulator.navigable()
        index = np.where(moving, (allowed.number == target[:, None]).argmax(axis=1) + 1, 0)
        assert (allowed.number == target[:, None]).any(axis=1)[moving].all()
        tilt = np.array([row[2] for row in rows]) - simulator.elevation
        turn = ~moving & (np.abs(tilt) < 0.1) & (np.abs(np.array([row[1] for row in rows]) - simulator.heading) > 0.1)
        simulator.make_actions(index, turn.astype(float), np.where(np.abs(tilt) > 0.1, tilt, 0))
        np.testing.assert_array_equal(simulator.heading, [row[1] for row in rows])
        np.testing.assert_array_equal(simulator.elevation, [row[2] for row in rows])


def test_val_seen_has_a_path_with_a_fourth_instruction(data):
    episodes = data.read(data.annotation("val_seen"), "val_seen")
    assert len(episodes) == 1021
    local = [episode for episode in episodes if episode.scan in data.graphs]
    evaluator = R2REvaluator(episodes, data.graphs)
    assert len(evaluator.episodes) == 1020  # the official script knows three per path
    assert all(problem_of_path(data.graphs[episode.scan], episode) is None for episode in local)
