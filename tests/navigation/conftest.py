"""Three generated houses, written once, and graphs of a few viewpoints."""

import numpy as np
import pytest

SQUARE = np.array([[0, 0, 0], [0, 3, 0], [4, 3, 0], [4, 0, 0], [9, 9, 0]], dtype=float)


@pytest.fixture(scope="session")
def make_graph():
    """Makes the graph of viewpoints a, b, c, ... from edges between their numbers."""
    from tasks.navigation.graph import ScanGraph

    def make(edges, positions=SQUARE, included=None):
        n = len(positions)
        matrix = np.zeros((n, n), dtype=bool)
        for a, b in edges:
            matrix[a, b] = matrix[b, a] = True
        included = np.ones(n, dtype=bool) if included is None else np.array(included)
        return ScanGraph("scan", "abcde"[:n], positions, included, matrix)

    return make


@pytest.fixture(scope="session")
def houses(tmp_path_factory):
    """Two houses to train in and an unseen one in the layout of R2R; not to be changed."""
    from tasks.navigation.sample import write_sample

    root = tmp_path_factory.mktemp("navigation") / "houses"
    write_sample(root, num_train=2, num_unseen=1)
    return root


@pytest.fixture(scope="session")
def house_data(houses):
    """Their datamodule."""
    from tasks.navigation.data import SampleHouses

    return SampleHouses(str(houses))
