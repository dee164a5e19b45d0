import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.features import NoObjects
from tasks.navigation.rooms import ROOMS
from tasks.navigation.simulator import Simulator
from tasks.navigation.world import World


@pytest.fixture(scope="module")
def episodes(house_data):
    return house_data.samples("train")[::7][:8]


def follow(environment, episodes, steps=8):
    """Walk the shortest paths; the observations."""
    seen = [environment.reset(episodes)]
    for _ in range(steps):
        seen.append(environment.step(seen[-1].teacher))
    return seen


def test_the_teacher_walks_the_annotated_paths(house_data, episodes):
    environment = house_data.environment()
    seen = follow(environment, episodes)
    assert seen[-1].ended.all()
    assert seen[-1].distance.tolist() == [0] * len(episodes)
    for row, episode in enumerate(episodes):
        rows = [viewpoint for viewpoint, _, _ in environment.trajectory(row)]
        assert [v for i, v in enumerate(rows) if i == 0 or rows[i - 1] != v] == list(episode.path)
    assert list(environment.trajectories()) == [episode.key for episode in episodes]


def test_observations_have_the_promised_shapes(house_data, episodes):
    for t, seen in enumerate(follow(house_data.environment(), episodes, 3)):
        rows = int(seen.num_options.sum())
        assert seen.input_ids.shape == (len(episodes), house_data.max_text)
        assert seen.text_length.tolist() == [len(episode.tokens) for episode in episodes]
        assert seen.objects.shape[::2] == (rows, house_data.feature_dim)
        assert seen.boxes.shape == (rows, seen.objects.shape[1], 7)
        assert seen.orientation.shape == (rows, 4)
        assert seen.num_objects.min() >= 1
        assert [len(row) + 1 for row in seen.candidates] == seen.num_options.tolist() == seen.mask.sum(dim=1).tolist()
        stop = seen.row_start + seen.num_options - 1
        assert (seen.views[stop] == -1).all() if t == 0 else (seen.views[stop[~seen.ended]] >= 0).all()
        assert seen.direction[stop].tolist() == [-100] * len(episodes)
        expected = torch.zeros(4) if t == 0 else torch.tensor([0.0, -1.0, 0.0, 1.0])  # from behind
        torch.testing.assert_close(seen.orientation[stop], expected.expand(len(episodes), 4), atol=1e-6, rtol=0)
        table = seen.table(torch.arange(1.0, rows + 1, requires_grad=True))
        assert table[seen.mask].tolist() == list(range(1, rows + 1))
        assert (table[~seen.mask] == 0).all()
        table.sum().backward()


def test_stopping_shows_what_led_here(house_data, episodes):
    first, second, *_ = follow(house_data.environment(stop_feature=np.full(house_data.feature_dim, 0.5)), episodes)
    stop = first.row_start + first.num_options - 1
    assert (first.objects[stop, 0] == 0.5).all()
    assert first.boxes[stop, 0].tolist() == [[0, 0, 1, 1, 1, 1, 1]] * len(episodes)
    for row in range(len(episodes)):
        chosen, stop = (
            int(first.row_start[row] + first.teacher[row]),
            int(second.row_start[row] + second.num_options[row]) - 1,
        )
        count = int(first.num_objects[chosen])
        assert int(second.num_objects[stop]) == count
        assert torch.equal(second.objects[stop, :count], first.objects[chosen, :count])
        assert second.views[stop] == first.views[chosen]


def test_trajectories_are_what_the_simulator_does(house_data, episodes):
    """Every row is one elementary action; the last of each move is row `idx` of what the view sees."""
    environment = house_data.environment()
    follow(environment, episodes)
    for row, episode in enumerate(episodes):
        simulator = Simulator(house_data.graphs)
        simulator.new_episodes([episode.scan], [episode.start], [episode.heading], [0.0])
        poses = environment.trajectory(row)
        for (here, heading, elevation), (there, _, tilted) in itertools.pairwise(poses):
            state = simulator.states()[0]
            assert (state.viewpoint, state.heading, state.elevation) == (here, heading, elevation)
            index = next(i for i, location in enumerate(state.navigable) if location.viewpoint == there)
            tilt = np.sign(tilted - elevation)
            simulator.make_actions([index], [0 if index or tilt else 1], [tilt])
        assert simulator.states()[0].viewpoint == poses[-1][0]


def test_supervision(house_data, episodes):
    seen = follow(house_data.environment(), episodes)
    rooms = house_data.room_labels
    for row, episode in enumerate(episodes):
        for t, step in enumerate(seen[: len(episode.path)]):
            following = episode.path[min(t + 1, len(episode.path) - 1)]
            assert ROOMS[step.next_room[row]] == ROOMS[rooms.of(episode.scan, following)]
            assert step.target_room[row] == rooms.of(episode.scan, episode.goal)
            assert float(step.progress[row]) == pytest.approx((t + 1) / len(episode.path))
        over = seen[len(episode.path)]
        assert over.ended[row]
        assert (over.teacher[row], over.next_room[row], over.target_room[row]) == (-1, -100, -100)
        rows = slice(int(over.row_start[row]), int(over.row_start[row] + over.num_options[row]))
        assert set(over.direction[rows].tolist()) == {-100}
    assert {0, 1, 2, 3} >= {d for step in seen for d in step.direction.tolist()} - {-100}


def test_visited_options(house_data, episodes):
    first, second, *_ = follow(house_data.environment(), episodes)
    assert not first.visited.any()
    for row, episode in enumerate(episodes):
        names = second.candidates[row]
        assert [names[i] for i in second.visited[row].nonzero().flatten()] == [episode.start]


def test_ended_episodes_are_frozen_unless_told_otherwise(house_data, episodes):
    for freeze, moved in ((True, False), (False, True)):
        environment = house_data.environment(freeze_ended=freeze)
        environment.reset(episodes)
        environment.step([-1] * len(episodes))
        before = environment.viewpoints
        seen = environment.step([0] * len(episodes))
        assert seen.ended.all()
        assert (environment.viewpoints != before) is moved
        assert (len(environment.trajectory(0)) > 1) is moved


def test_selected_rows_are_independent_copies(house_data, episodes):
    environment = house_data.environment()
    first = environment.reset(episodes)
    environment.step(first.teacher)
    beams = environment.select([2, 2, 0])
    assert [episode.id for episode in beams.episodes] == [episodes[i].id for i in (2, 2, 0)]
    seen = beams.observe()
    assert seen.input_ids.tolist() == environment.observe().input_ids[[2, 2, 0]].tolist()
    before = environment.trajectory(2), environment.viewpoints
    beams.step([0, -1, 0])
    assert (environment.trajectory(2), environment.viewpoints) == before
    assert beams.trajectory(1) == before[0]
    assert beams.trajectory(0)[: len(before[0])] == before[0]
    assert beams.trajectory(0) != before[0]
    assert environment.ended.tolist() == [False] * len(episodes)


def test_a_batch_of_none(house_data):
    seen = house_data.environment().reset([])
    assert (len(seen.input_ids), len(seen.objects), len(seen.teacher)) == (0, 0, 0)


def test_unknown_goals_are_not_supervised(house_data, episodes):
    hidden = dataclasses.replace(episodes[0], path=episodes[0].path[:1], has_goal=False)
    seen = house_data.environment().reset([hidden])
    assert seen.teacher.tolist() == [-1]
    assert seen.distance.isnan().all()
    assert seen.next_room.tolist() == seen.target_room.tolist() == [-100]


def test_relative_elevation_subtracts_the_agents(house_data, episodes):
    absolute, relative = (house_data.environment(relative_elevation=flag) for flag in (False, True))
    for environment in (absolute, relative):
        environment.reset(episodes)
        environment.view_index[:] = 24  # looking up
    torch.testing.assert_close(absolute.observe().orientation[0, :2], relative.observe().orientation[0, :2])
    sines = [environment.observe().orientation[0, 2] for environment in (absolute, relative)]
    assert torch.asin(sines[0]) - torch.asin(sines[1]) == pytest.approx(np.pi / 6, abs=1e-5)


def test_wrong_actions_move_nobody(house_data, episodes):
    environment = house_data.environment()
    seen = environment.reset(episodes)
    with pytest.raises(UserError, match=r"actions of shape \(1,\); expected \(8,\)"):
        environment.step([0])
    with pytest.raises(
        UserError, match=rf"{episodes[0].key}: action 99; expected 0 to {seen.num_options[0] - 1}, or -1"
    ):
        environment.step([99, *[0] * 7])
    assert environment.viewpoints == [episode.start for episode in episodes]


def test_what_is_kept_in_memory_is_bounded(house_data, episodes):
    graphs, objects = house_data.graphs, house_data.object_store
    small, large = World(graphs, objects, cache_bytes=2000), World(graphs, objects)
    seen = [follow(NavigationEnvironment(world, 32), episodes, 4)[-1] for world in (small, large)]
    assert torch.equal(seen[0].objects, seen[1].objects)
    assert len(small._cache) < len(large._cache)


def test_missing_features_are_named(house_data, episodes):
    class Missing(NoObjects):
        def view(self, scan, viewpoint, view):
            return None

    with pytest.raises(DataError, match=rf"scan {episodes[0].scan}, viewpoint {episodes[0].start}, view .*no object"):
        NavigationEnvironment(World(house_data.graphs, Missing()), 32).reset(episodes[:1])
