"""Navigation metrics one episode at a time in plain Python, as the evaluation scripts of the field compute them."""

import itertools

import numpy as np


def r2r_figures(distances, trajectory, annotated, threshold=3.0):
    """All figures of one episode; `distances` are nested dictionaries, paths are lists of viewpoints."""
    goal = annotated[-1]
    nearest = min((distances[node][goal], node) for node in trajectory)[1]
    error = distances[trajectory[-1]][goal]
    length = path_length(distances, trajectory)
    shortest = distances[annotated[0]][goal]
    success = float(error < threshold)
    similarity = np.exp(-warping_cost(distances, trajectory, annotated) / (threshold * len(annotated)))
    return {
        "TL": length,
        "NE": error,
        "OSR": float(distances[nearest][goal] < threshold),
        "SR": success,
        "SPL": success * shortest / max(length, shortest),
        "nDTW": similarity,
        "sDTW": success * similarity,
        "CLS": coverage_by_length(distances, trajectory, annotated, threshold),
    }


def path_length(distances, path):
    return np.sum([distances[a][b] for a, b in itertools.pairwise(path)])


def warping_cost(distances, trajectory, annotated):
    table = np.inf * np.ones((len(trajectory) + 1, len(annotated) + 1))
    table[0][0] = 0
    for i in range(1, len(trajectory) + 1):
        for j in range(1, len(annotated) + 1):
            before = min(table[i - 1][j], table[i][j - 1], table[i - 1][j - 1])
            table[i][j] = distances[trajectory[i - 1]][annotated[j - 1]] + before
    return table[len(trajectory)][len(annotated)]


def coverage_by_length(distances, trajectory, annotated, threshold):
    near = [np.min([distances[node][other] for other in trajectory]) for node in annotated]
    coverage = np.mean(np.exp(-np.array(near) / threshold))
    expected = coverage * path_length(distances, annotated)
    return coverage * expected / (expected + np.abs(expected - path_length(distances, trajectory)))
