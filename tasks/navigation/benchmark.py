"""``python -m tasks.navigation benchmark``: how fast simulator, environment and metrics are on one core."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.navigation.data import SampleHouses
from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import R2REvaluator
from tasks.navigation.features import NoObjects
from tasks.navigation.graph import Graphs
from tasks.navigation.simulator import Simulator
from tasks.navigation.world import World

REPEATS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of some runs; other processes hardly disturb it."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def simulator_steps(graphs: Graphs, agents: int, discretized: bool, steps: int = 50) -> float:
    """Steps per second of a batch of agents that turn and, where a neighbour is in view, walk."""
    generator = np.random.default_rng(0)
    headings = generator.uniform(0, 6, agents)
    scans = [list(graphs)[number % len(graphs)] for number in range(agents)]
    starts = [graphs[scan].nodes[number % len(graphs[scan].nodes)] for number, scan in enumerate(scans)]
    simulator = Simulator(graphs, discretized=discretized)
    simulator.new_episodes(scans, starts, headings, np.zeros(agents))
    moves = []
    for _ in range(steps):  # drawn beforehand, so that walking itself is measured
        index = np.minimum(generator.integers(0, 2, agents), simulator.navigable().count)
        moves.append((index, generator.choice([-0.5, 0.5], agents), generator.choice([-0.5, 0.0, 0.5], agents)))
        simulator.make_actions(*moves[-1])

    def walk() -> None:
        simulator.new_episodes(scans, starts, headings, np.zeros(agents))
        for move in moves:
            simulator.make_actions(*move)

    return agents * steps / best_seconds(walk)


def random_episodes(graphs: Graphs, count: int) -> tuple[list[Episode], dict[str, dict[str, list[str]]]]:
    """Random walks of R2R's lengths as annotated paths, and others from the same starts as records."""
    generator = np.random.default_rng(0)
    episodes, records = [], {}
    for number in range(count):
        graph = graphs[list(graphs)[number % len(graphs)]]
        start = graph.index[graph.nodes[int(generator.integers(len(graph.nodes)))]]
        paths = []
        for length in (generator.integers(5, 8), generator.integers(4, 13)):
            nodes = [start]
            while len(nodes) < length:
                nodes.append(int(generator.choice(np.flatnonzero(graph.edges[nodes[-1]]))))
            paths.append([graph.viewpoints[node] for node in nodes])
        episodes.append(Episode(f"{number}_0", "val", graph.scan, tuple(paths[0]), 0.0, ""))
        records[f"{number}_0"] = {"trajectory": paths[1]}
    return episodes, records


def main(arguments: Sequence[str]) -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(prog="python -m tasks.navigation benchmark", allow_abbrev=False)
    parser.add_argument("--data.root", dest="root", metavar="FOLDER", help="with connectivity/; default: the sample")
    options = parser.parse_args(arguments)
    if options.root is None:
        data = SampleHouses()
        data.prepare_data()
        options.root = data.root
    graphs = Graphs(Path(options.root, "connectivity"))
    if not len(graphs):
        raise SystemExit(f"error: {graphs.folder}: holds no graph; expected <scan>_connectivity.json")
    table = Table("what", "rate", title=f"One core, {len(graphs)} scans")
    for discretized in (True, False):
        for agents in (1, 8, 64, 256):
            kind = "discrete" if discretized else "continuous"
            rate = simulator_steps(graphs, agents, discretized)
            table.add_row(f"simulator, {agents} agents, {kind} camera", f"{rate:,.0f} steps/s")
    episodes, records = random_episodes(graphs, 10_000)
    environment = NavigationEnvironment(World(graphs, NoObjects()))

    def follow() -> None:
        seen = environment.reset(episodes[:64])
        for _ in range(5):
            seen = environment.step(seen.teacher)

    table.add_row("environment, 64 episodes, no objects", f"{64 * 6 / best_seconds(follow):,.0f} observations/s")
    evaluator = R2REvaluator(episodes, graphs)
    table.add_row(
        "all figures of R2R, 10,000 trajectories",
        f"{10_000 / best_seconds(lambda: evaluator.evaluate(records)):,.0f} trajectories/s",
    )
    Console().print(table)
