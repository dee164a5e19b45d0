import itertools
import json

import numpy as np
import pytest

from tasks.core.data import DataError
from tasks.navigation.graph import Graphs, read_graph


def entries(graph):
    return [
        {
            "image_id": name,
            "pose": [0.0] * 3 + [float(graph.positions[i, 0])] + [0.0] * 3 + [float(graph.positions[i, 1])] + [0.0] * 8,
            "included": bool(graph.included[i]),
            "unobstructed": graph.edges[i].tolist(),
        }
        for i, name in enumerate(graph.viewpoints)
    ]


def write(folder, content, scan="scan"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{scan}_connectivity.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_distances_and_paths_along_edges(make_graph):
    graph = make_graph([(0, 1), (1, 2), (2, 3)])
    assert graph.distance("a", "d") == 10
    assert graph.shortest_path("a", "d") == list("abcd")
    assert graph.shortest_path("b", "b") == ["b"]
    assert graph.viewpoints[graph.next_hop[0, 3]] == "b"
    assert graph.next_hop[2, 2] == 2
    assert graph.nodes == tuple("abcd")
    assert graph.num_edges == 3
    assert (graph.adjacent("a", "b"), graph.adjacent("a", "d")) == (True, False)


def test_isolated_and_excluded_viewpoints(make_graph):
    graph = make_graph([(0, 1), (1, 2), (2, 3)], included=[True, True, False, True, True])
    assert graph.nodes == ("a", "b")
    assert np.isinf(graph.distance("a", "d"))
    assert np.isinf(graph.distance("e", "e"))  # as unreachable as for everyone else
    assert graph.next_hop[0, 4] == -1
    with pytest.raises(DataError, match=r"scan scan: no path leads from viewpoint a to d"):
        graph.shortest_path("a", "d")
    with pytest.raises(DataError, match=r"viewpoint c of scan scan is excluded"):
        graph.distance("a", "c")
    with pytest.raises(DataError, match=r"viewpoint 'z' is not in the graph of scan scan"):
        graph.number("z")


def test_next_hops_follow_the_shortest_paths(make_graph):
    generator = np.random.default_rng(0)
    positions = generator.uniform(0, 10, (5, 3))
    graph = make_graph([(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 3)], positions)
    for a, b in itertools.permutations(graph.viewpoints, 2):
        path = graph.shortest_path(a, b)
        walked = [a]
        while walked[-1] != b:
            walked.append(graph.viewpoints[graph.next_hop[graph.index[walked[-1]], graph.index[b]]])
        assert walked == path


def test_graphs_of_a_folder(make_graph, tmp_path):
    graph = make_graph([(0, 1), (1, 2)])
    write(tmp_path / "connectivity", entries(graph))
    graphs = Graphs(tmp_path / "connectivity")
    assert list(graphs) == ["scan"]
    assert graphs["scan"].viewpoints == graph.viewpoints
    np.testing.assert_array_equal(graphs["scan"].edges, graph.edges)
    assert ("scan" in graphs, "other" in graphs, "../scan" in graphs) == (True, False, False)
    for name in ("other", "../connectivity/scan"):
        with pytest.raises(DataError, match=rf"scan '{name}': no file"):
            graphs[name]


def test_what_is_wrong_with_a_file_is_named(make_graph, tmp_path):
    good = entries(make_graph([(0, 1)]))
    for change, message in [
        ("{", "cannot be read as JSON"),
        ([], "expected a list of viewpoints"),
        ([1], "viewpoint 0: expected an object, got int"),
        ([{**good[0], "pose": [0.0] * 15}, *good[1:]], "viewpoint 0: pose: expected 16 numbers"),
        ([{**good[0], "pose": [float("nan")] * 16}, *good[1:]], "viewpoint 0: pose: expected 16 numbers"),
        ([{**good[0], "included": 1}, *good[1:]], "viewpoint 0: included: expected true or false"),
        ([good[0], {**good[1], "unobstructed": [True]}, *good[2:]], "viewpoint 1: unobstructed: expected 5 times"),
        ([{**good[0], "image_id": "b"}, *good[1:]], "an image_id occurs twice"),
        ([{**good[0], "image_id": "../b"}, *good[1:]], "viewpoint 0: image_id: expected the viewpoint's id"),
    ]:
        path = write(tmp_path, change)
        with pytest.raises(DataError, match=message) as error:
            read_graph(path, "scan")
        assert str(path) in str(error.value)
