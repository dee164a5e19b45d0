import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tasks.core.errors import UserError
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import NDHEvaluator, R2REvaluator, REVERIEEvaluator
from tasks.navigation.graph import Graphs
from tasks.navigation.metrics import NavigationMetrics

NAMES = ("TL", "NE", "OSR", "SR", "SPL", "nDTW", "sDTW", "CLS")


def official_like():
    spec = importlib.util.spec_from_file_location("official_like", Path(__file__).with_name("official_like.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_episodes(graphs, count, nodes, steps, seed=0):
    """Episodes whose annotated paths have `nodes` viewpoints and random walks of up to `steps`, by id."""
    generator = np.random.default_rng(seed)
    episodes, walks = [], {}
    for number in range(count):
        graph = graphs[list(graphs)[number % len(graphs)]]
        start = graph.index[graph.nodes[generator.integers(len(graph.nodes))]]
        path = walk(generator, graph, start, int(generator.integers(*nodes)))
        episode = Episode(f"{number}_0", "val", graph.scan, tuple(path), 0.0, "")
        episodes.append(episode)
        walks[episode.id] = walk(generator, graph, graph.index[path[0]], int(generator.integers(*steps)))
    return episodes, walks


def walk(generator, graph, start, length):
    nodes = [int(start)]
    while len(nodes) < length:
        neighbours = np.flatnonzero(graph.edges[nodes[-1]])
        nodes.append(int(neighbours[generator.integers(len(neighbours))]))
    return [graph.viewpoints[node] for node in nodes]


def nested(graph):
    rows = (dict(zip(graph.viewpoints, row, strict=True)) for row in graph.distances.tolist())
    return dict(zip(graph.viewpoints, rows, strict=True))


def test_ten_thousand_trajectories_thirty_times_faster_than_plain_python(house_data):
    """Paths as long as R4R's, walks of up to 20 viewpoints; all figures equal to 1e-12."""
    graphs = house_data.graphs
    episodes, walks = random_episodes(graphs, 10_000, nodes=(8, 15), steps=(6, 20))
    records = {id: {"trajectory": nodes} for id, nodes in walks.items()}
    evaluator = R2REvaluator(episodes, graphs)
    evaluator.evaluate(records)
    ours = min(seconds(lambda: evaluator.evaluate(records)) for _ in range(5))
    evaluation = evaluator.evaluate(records)
    distances = {scan: nested(graphs[scan]) for scan in graphs}
    reference, some = official_like(), episodes[:2000]
    figures = []
    theirs = 5 * seconds(
        lambda: figures.extend(reference.r2r_figures(distances[e.scan], walks[e.id], e.path) for e in some)
    )
    for name in NAMES:
        np.testing.assert_allclose(
            evaluation.table[name][: len(some)], [f[name] for f in figures], rtol=1e-12, atol=1e-12
        )
    assert theirs / ours >= 30, f"{theirs / ours:.0f} times"


def seconds(work):
    begin = time.process_time()
    work()
    return time.process_time() - begin


@pytest.fixture
def line(make_graph):
    """Five viewpoints in a row, 2 m apart."""
    positions = np.array([[0.0, 2.0 * i, 0.0] for i in range(5)])
    return {"scan": make_graph([(0, 1), (1, 2), (2, 3), (3, 4)], positions)}


def score(evaluator, trajectory, **record):
    (id,) = evaluator.episodes
    return evaluator.evaluate({id: {"trajectory": list(trajectory), **record}}).summary


def test_figures_of_r2r_by_hand(line):
    evaluator = R2REvaluator([Episode("1_0", "val", "scan", tuple("abcd"), 0.0, "")], line)
    figures = score(evaluator, "abcde")
    assert figures["TL"] == 8
    assert figures["NE"] == 2
    assert figures["SR"] == figures["OSR"] == 1
    assert figures["SPL"] == 6 / 8
    assert figures["nDTW"] == figures["sDTW"] == pytest.approx(np.exp(-2 / 12))
    assert figures["CLS"] == pytest.approx(6 / (6 + 2))
    assert score(evaluator, "ab")["SR"] == 0  # 4 m
    assert score(evaluator, "abcdcba") == score(evaluator, "abcdcba") | {"SR": 0, "OSR": 1, "SPL": 0, "sDTW": 0}


def test_camera_turns_count_in_warping_only_when_asked_for(line):
    episodes = [Episode("1_0", "val", "scan", tuple("abc"), 0.0, "")]
    turning = [["a", 0.0, 0.0], ["a", 0.5, 0.0], ["b", 0.5, 0.0], ["b", 1.0, 0.0]]
    without = score(R2REvaluator(episodes, line), turning)
    repeated = score(R2REvaluator(episodes, line, keep_repeats=True), turning)
    assert without == score(R2REvaluator(episodes, line), "ab")
    assert repeated["nDTW"] == without["nDTW"]  # waiting on the reference costs nothing
    late = [["a", 0.0, 0.0], ["b", 0.0, 0.0], ["c", 0.0, 0.0], ["d", 0.0, 0.0], ["d", 1.0, 0.0]]
    assert (
        score(R2REvaluator(episodes, line, keep_repeats=True), late)["nDTW"]
        < score(R2REvaluator(episodes, line), late)["nDTW"]
    )


def test_definitions_differ_where_the_annotated_path_is_a_detour(line):
    episodes = [Episode("1_0", "val", "scan", tuple("abcbcd"), 0.0, "")]
    assert score(R2REvaluator(episodes, line), "abcbcd")["SPL"] == 6 / 10
    assert score(R2REvaluator(episodes, line, "duet"), "abcbcd")["SPL"] == 1


def test_the_official_script_scores_three_instructions_of_a_path(line):
    episodes = [Episode(f"1_{k}", "val", "scan", tuple("abc"), 0.0, "") for k in range(4)]
    assert list(R2REvaluator(episodes, line).episodes) == ["1_0", "1_1", "1_2"]
    assert len(R2REvaluator(episodes, line, "duet").episodes) == 4


def test_figures_of_reverie_by_hand(line):
    episode = Episode("1_7_0", "val", "scan", tuple("abc"), 0.0, "", target="7", target_views=frozenset("ce"))
    evaluator = REVERIEEvaluator([episode], line)
    assert score(evaluator, "abcde", object=7) == {"TL": 8, "OSR": 1, "SR": 1, "SPL": 0.5, "RGS": 1, "RGSPL": 0.5}
    assert score(evaluator, "abcd", object="8") == {"TL": 6, "OSR": 1, "SR": 0, "SPL": 0, "RGS": 0, "RGSPL": 0}
    assert score(evaluator, "a")["RGS"] == 0  # nothing named


def test_figures_of_ndh_by_hand(line):
    episode = Episode(
        "1", "val", "scan", tuple("abc"), 0.0, "", end_region=("d", "e"), planner_path=("a", "b", "c", "d")
    )
    evaluator = NDHEvaluator([episode], line)
    figures = score(evaluator, "abcd")
    assert (figures["GP"], figures["NE"], figures["SR"], figures["SPL"], figures["OPSR"]) == (6, 2, 1, 4 / 6, 1)
    assert score(evaluator, "a")["GP"] == 0
    assert (score(NDHEvaluator([episode], line, "duet"), "abc")["SR"], score(evaluator, "abc")["SR"]) == (0, 1)
    still = Episode("1", "val", "scan", ("b",), 0.0, "", end_region=("a",), planner_path=("b",))
    assert score(NDHEvaluator([still], line), "b")["SPL"] == 1
    assert score(NDHEvaluator([still], line), "bcb") == score(NDHEvaluator([still], line), "bcb") | {"SPL": 0, "SR": 1}
    assert score(NDHEvaluator([still], line), "bc")["GP"] == -2


def test_what_is_wrong_with_a_trajectory_is_named(line):
    evaluator = R2REvaluator([Episode("1_0", "val", "scan", tuple("abc"), 0.0, "")], line)
    for trajectory, message in [
        ([], "1_0: trajectory: expected a list of at least one viewpoint"),
        ("bc", "1_0: the trajectory begins at viewpoint b; expected a"),
        ("ac", "1_0: the trajectory goes from viewpoint a to c; expected neighbours"),
        ("az", "1_0: viewpoint 'z' is not in the graph of scan scan"),
        ([["a", 0, 0], 7], "1_0: trajectory: expected rows of viewpoint, heading and elevation, got '7'"),
        ([["a", 0, 0], []], "1_0: trajectory: expected rows of viewpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            score(evaluator, trajectory)
    assert score(R2REvaluator([*evaluator.episodes.values()], line, "duet"), "ac")["SR"] == 1  # teleports
    with pytest.raises(UserError, match="no trajectory for 1 of 1 instructions, the first is '1_0'"):
        evaluator.evaluate({"2_0": {"trajectory": ["a"]}})
    with pytest.raises(UserError, match="has no trajectory; expected one for each"):
        evaluator.evaluate({"1_0": {}})
    hidden = Episode("1_0", "test", "scan", ("a",), 0.0, "", has_goal=False)
    with pytest.raises(UserError, match="1_0: its goal is not published"):
        R2REvaluator([hidden], line)
    with pytest.raises(UserError, match="definition: 'mine' was given"):
        R2REvaluator([], line, "mine")


def test_the_metric_scores_each_split_by_its_own_evaluator(line):
    splits = {"val_seen": "abc", "val_unseen": "cde"}
    evaluators = {
        split: R2REvaluator([Episode("1_0", split, "scan", tuple(path), 0.0, "")], line)
        for split, path in splits.items()
    }
    metric = NavigationMetrics(evaluators)
    metric.update({"val_seen/1_0": {"trajectory": ["a"]}})
    metric.update({"val_unseen/1_0": {"trajectory": list("cde")}})
    results = metric.compute()
    assert (results["val_seen/SR"], results["val_unseen/SR"]) == (0, 1)
    assert metric.evaluations["val_seen"].rows()[0] | {"NE": 4.0} == metric.evaluations["val_seen"].rows()[0]
    with pytest.raises(UserError, match="episode 'val_seen/1_0' was evaluated twice"):
        metric.update({"val_seen/1_0": {"trajectory": ["a"]}})
    metric.reset()
    metric.update({"val_unseen/1_0": {"trajectory": list("cd")}})
    assert "val_seen/SR" not in metric.compute()
    metric.update({"train/1_0": {"trajectory": ["a"]}})
    with pytest.raises(UserError, match="records of split 'train'; expected val_seen, val_unseen splits"):
        metric.compute()


def compute_on(rank, world_size, folder, file, results):
    graphs = Graphs(folder)
    episodes, walks = random_episodes(graphs, 13, nodes=(3, 7), steps=(2, 9))
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    metric = NavigationMetrics({"val": R2REvaluator(episodes, graphs)})
    metric.update({episode.key: {"trajectory": walks[episode.id]} for episode in episodes[rank::world_size]})
    figures = metric.compute()
    results[rank] = figures, metric.evaluations["val"].rows()
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_with_thirteen_episodes_equal_one(houses, tmp_path):
    folder = str(houses / "connectivity")
    one = {}
    compute_on(0, 1, folder, None, one)
    with mp.Manager() as manager:
        two = manager.dict()
        mp.start_processes(compute_on, (2, folder, str(tmp_path / "group"), two), nprocs=2, start_method="fork")
        assert dict(two) == {0: one[0], 1: one[0]}
    assert len(one[0][1]) == 13


def test_figures_do_not_depend_on_how_instructions_are_grouped(house_data):
    episodes, walks = random_episodes(house_data.graphs, 30, nodes=(3, 7), steps=(2, 9), seed=1)
    records = {id: {"trajectory": nodes} for id, nodes in walks.items()}
    together = R2REvaluator(episodes, house_data.graphs).evaluate(records)
    assert together.ids == tuple(records)
    for row, episode in enumerate(episodes):
        alone = R2REvaluator([episode], house_data.graphs).evaluate(records)
        assert alone.rows()[0] == together.rows()[row]
