"""What navigation shows in the report: figures by scan and path length, maps of episodes, their steps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tasks.core.report import Picture, ReportParts, Table
from tasks.core.report.figures import COLOURS, INK, png
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import Evaluation
from tasks.navigation.graph import ScanGraph

EPISODES = 3  # best and worst, each
METRES = ("TL", "NE", "GP")
# Columns of the tables, where the evaluation has them, and what episodes are ranked by: the first that it has.
COLUMNS = ("GP", "SR", "OSR", "SPL", "nDTW", "RGS", "RGSPL", "NE", "TL")
RANKING = ("GP", "nDTW", "SPL")


def navigation_report(
    evaluations: Mapping[str, Evaluation],
    records: Mapping[str, Mapping[str, Any]],
    episodes: Mapping[str, Episode],
    graphs: Mapping[str, ScanGraph],
) -> ReportParts:
    """Tables and pictures of evaluations by split.

    `records` and `episodes` are by key. A record may have `steps`: what the agent could choose, with which probability,
    what it chose and which objects it attended to.
    """
    parts = ReportParts()
    for split, evaluation in evaluations.items():
        own = [episodes[f"{split}/{id}"] for id in evaluation.ids]
        lengths = [f"{len(episode.path)} viewpoints" for episode in own]
        parts.tables.append(outcomes(split, evaluation))
        parts.tables.append(group_table(f"{split}: by path length", "annotated path", evaluation, lengths))
        parts.tables.append(group_table(f"{split}: by scan", "scan", evaluation, list(evaluation.scans)))
    for split, evaluation in list(evaluations.items())[-1:]:  # val_unseen: what the headline speaks of
        best, worst = extremes(evaluation, [episodes[f"{split}/{id}"].path for id in evaluation.ids])
        for title, rows in (("Best episodes", best), ("Worst episodes", worst)):
            for row in rows:
                key = f"{split}/{evaluation.ids[row]}"
                episode, record = episodes[key], records[key]
                parts.pictures.append(
                    Picture(title, caption(episode, evaluation, row), draw_map(graphs[episode.scan], episode, record))
                )
                if steps := record.get("steps"):
                    parts.tables.append(steps_table(f"Steps of {key}: {episode.instruction}", steps))
    return parts


def group_table(title: str, what: str, evaluation: Evaluation, groups: Sequence[str]) -> Table:
    """Means by group, in per cent unless they are metres."""
    names = [name for name in COLUMNS if name in evaluation.table]
    rows: list[list[str | int | float | None]] = []
    order = np.array(groups)
    for group in sorted(set(groups), key=_natural):
        inside = order == group
        means = [float(np.mean(evaluation.table[name][inside])) * (1 if name in METRES else 100) for name in names]
        rows.append([group, int(inside.sum()), *means])
    return Table(title, [what, "instructions", *(f"{n} m" if n in METRES else f"{n} %" for n in names)], rows)


def outcomes(split: str, evaluation: Evaluation) -> Table:
    """How episodes end: at the goal, after passing it, or never near it."""
    arrived, near = evaluation.table["SR"] > 0, evaluation.table["OSR"] > 0
    kinds = {"stopped at the goal": arrived, "passed the goal": near & ~arrived, "never came near it": ~near & ~arrived}
    rows: list[list[str | int | float | None]] = [
        [name, int(kind.sum()), 100 * float(kind.mean())] for name, kind in kinds.items()
    ]
    return Table(f"{split}: outcomes", ["outcome", "instructions", "%"], rows)


def extremes(evaluation: Evaluation, paths: Sequence[tuple[str, ...]]) -> tuple[list[int], list[int]]:
    """Rows of the best and of the worst episodes, the longer ones first among equals, each path at most once."""
    score = next(evaluation.table[name] for name in RANKING if name in evaluation.table)
    length = evaluation.table["shortest"]
    chosen: list[list[int]] = []
    seen: set[tuple[str, ...]] = set()
    for sign in (-1, 1):
        rows: list[int] = []
        for row in sorted(range(len(score)), key=lambda row: (sign * score[row], -length[row], evaluation.ids[row])):
            if len(rows) < EPISODES and paths[row] not in seen:
                seen.add(paths[row])
                rows.append(row)
        chosen.append(rows)
    return chosen[0], chosen[1]


def caption(episode: Episode, evaluation: Evaluation, row: int) -> str:
    """Key, figures and instruction of an episode."""
    figures = [
        f"{name} {evaluation.table[name][row]:.2f}{' m' if name in METRES else ''}"
        for name in COLUMNS
        if name in evaluation.table
    ]
    instruction = textwrap.shorten(episode.instruction, 400, placeholder=" …")
    return f"{episode.key} ({episode.scan}): {', '.join(figures)}. “{instruction}”"


def steps_table(title: str, steps: Sequence[Mapping[str, Any]]) -> Table:
    """One row per decision: where, what was chosen of how many options, how sure, what was attended to."""
    rows: list[list[str | int | float | None]] = []
    for number, step in enumerate(steps, start=1):
        choice, options = int(step["choice"]), step["options"]
        chosen = "stop" if not 0 <= choice < len(options) else f"go to {options[choice][:8]}"
        scores = step.get("scores") or []
        probability = 100 * float(scores[choice]) if -len(scores) <= choice < len(scores) else None
        attended = ", ".join(f"{label} {100 * weight:.0f} %" for label, weight in step.get("attended", ()))
        rows.append([number, step["viewpoint"][:8], chosen, len(options) + 1, probability, attended or "–"])
    columns = ["step", "viewpoint", "choice", "options", "probability %", "attended objects"]
    return Table(textwrap.shorten(title, 200, placeholder=" …"), columns, rows)


def draw_map(graph: ScanGraph, episode: Episode, record: Mapping[str, Any]) -> bytes:
    """The graph from above with the annotated and the taken path, as PNG; darker viewpoints are higher."""
    taken = [row if isinstance(row, str) else row[0] for row in record["trajectory"]]
    included = [number for number in range(len(graph)) if graph.included[number]]
    x, y, z = graph.positions[included].T
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    axes = figure.add_subplot()
    a, b = np.nonzero(np.triu(graph.edges | graph.edges.T))
    segments = np.stack([graph.positions[a, :2], graph.positions[b, :2]], axis=1)
    axes.add_collection(LineCollection(list(segments), colors="#d5d9e0", linewidths=0.8, zorder=1))
    axes.scatter(x, y, c=-z, cmap="gray", vmin=-z.max() - 2, vmax=-z.min() + 2, s=10, zorder=2)
    for path, colour, width, label in (
        (list(episode.path), COLOURS[0], 5.0, "annotated"),
        (taken, COLOURS[1], 1.8, "taken"),
    ):
        points = _points(graph, path)
        axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=width, alpha=0.75, label=label, zorder=3)
    ends = (
        ("start", taken[0], "s", "white"),
        ("goal", episode.goal, "*", COLOURS[0]),
        ("end", taken[-1], "o", COLOURS[1]),
    )
    for label, viewpoint, marker, face in ends:
        px, py = _points(graph, [viewpoint])[0]
        size = 150 if marker == "*" else 45
        axes.scatter(px, py, marker=marker, s=size, facecolor=face, edgecolor=INK, linewidth=0.9, zorder=4, label=label)
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.tick_params(length=0, labelsize=7, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("x, m", fontsize=8, color=INK)
    axes.set_ylabel("y, m", fontsize=8, color=INK)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8, labelcolor=INK)
    return png(figure, dpi=120)


def _points(graph: ScanGraph, path: Sequence[str]) -> NDArray[np.float64]:
    return graph.positions[[graph.index[viewpoint] for viewpoint in path], :2]


def _natural(name: str) -> tuple[int, str]:
    """Numbers at the beginning of a name in the order of their size."""
    first = name.split(" ", 1)[0]
    return (int(first), "") if first.isdecimal() else (-1, name)
