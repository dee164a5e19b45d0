"""Golden cases of navigation graphs, the simulator, panoramic candidates, text and metrics.

A case is told by what its json holds. Graphs are looked for beside the case, then in every folder of goldens.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tasks.core.errors import UserError
from tasks.navigation.angles import angle_features, view_angle_features, view_elevation, view_heading
from tasks.navigation.episodes import Episode, read_ndh, read_r2r, read_reverie, visible_objects
from tasks.navigation.evaluators import NDHEvaluator, R2REvaluator, REVERIEEvaluator
from tasks.navigation.graph import SUFFIX, read_graph
from tasks.navigation.sightlines import Camera, Panorama
from tasks.navigation.simulator import Simulator
from tasks.navigation.submission import read_submission
from tasks.navigation.text import WordPieces, WordTokenizer, split_sentence

HERE = Path(__file__).parent.parent / "goldens"
ANGLE = 3e-7  # the C++ atan2f differs from a correctly rounded one in the last place
FLOAT32_SUMS = 1e-6  # ORIST adds up its metrics in float32
EXACT = 1e-12
_graphs = {}


class GoldenGraphs(Mapping):
    """The graphs in the folders of the goldens."""

    def __init__(self, path):
        roots = [Path(root) for root in os.environ.get("FRUGAL_GOLDENS", "").split(":") if root]
        self.folders = [path.parent, *path.parents[1:3], *(root / "vln" for root in roots), HERE / "vln"]

    def _find(self, scan):
        for folder in self.folders:
            for place in (folder, folder / "connectivity"):
                if (place / f"{scan}{SUFFIX}").is_file():
                    return place / f"{scan}{SUFFIX}"
        return None

    def __getitem__(self, scan):
        path = self._find(scan)
        if path is None:
            raise UserError(f"scan {scan!r}: no file")
        if path not in _graphs:
            _graphs[path] = read_graph(path, scan)
        return _graphs[path]

    def __iter__(self):
        return iter(sorted({p.name.removesuffix(SUFFIX) for f in self.folders for p in f.glob(f"**/*{SUFFIX}")}))

    def __len__(self):
        return len(list(iter(self)))


def run(meta, tensors, path):
    if isinstance(meta, list) and meta and "unobstructed" in meta[0]:
        return run_connectivity(meta, path)
    if not isinstance(meta, dict):
        return None
    runners = {
        "sequences": run_actions,
        "configs": run_navigable,
        "relative": run_panorama,
        "candidates": run_panorama,
        "wordpiece": run_text,
        "word": run_text,
        "bbox": run_reverie,
        "trusted_paths": run_ndh,
        "duet_edge_cases": run_r2r,
        "official_edge_cases": run_r2r,
    }
    for mark, runner in runners.items():
        if mark in meta and "dims" not in meta:
            runner(meta, GoldenGraphs(path), path)
            return {}
    scans = meta.get("scans")
    if isinstance(scans, dict) and all("nodes" in scan for scan in scans.values()):
        run_shortest(meta, GoldenGraphs(path), path)
        return {}
    if set(tensors) & {"orist", "duet"}:
        check_angle_features(tensors)
        return {}
    if "official" in meta and "predictions" in meta:
        run_r2r(meta, GoldenGraphs(path), path)
        return {}
    return None


def close(actual, expected, tolerance=EXACT):
    """Numbers that are equal to a relative (above 1) or absolute tolerance; NaN equals the text "nan"."""
    expected = math.nan if expected == "nan" else expected
    assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


def run_connectivity(meta, path):
    scan = path.name.removesuffix(SUFFIX)
    graph = read_graph(path, scan)
    assert list(graph.viewpoints) == [entry["image_id"] for entry in meta]
    assert graph.positions[:, 2].tolist() == [entry["pose"][11] for entry in meta]
    for number, entry in enumerate(meta):
        walkable = [
            other
            for other, flag in enumerate(entry["unobstructed"])
            if flag and entry["included"] and meta[other]["included"] and other != number
        ]
        assert np.flatnonzero(graph.edges[number]).tolist() == walkable
    return {}


def run_shortest(meta, graphs, path):
    files = [load_file(file) for file in path.parent.glob("*.safetensors")]
    for scan, expected in meta["scans"].items():
        graph = graphs[scan]
        assert set(graph.nodes) == set(expected["nodes"])
        assert graph.num_edges == expected["n_edges"]
        order = [graph.index[node] for node in expected["nodes"]]
        for matrix in [file[scan] for file in files if set(meta["scans"]) <= set(file)]:
            np.testing.assert_allclose(graph.distances[np.ix_(order, order)], matrix, rtol=0, atol=EXACT)
        for nodes in expected["paths"]:
            assert graph.shortest_path(nodes[0], nodes[-1]) == nodes
            walked = [nodes[0]]
            while walked[-1] != nodes[-1]:
                walked.append(graph.viewpoints[graph.next_hop[graph.index[walked[-1]], graph.index[nodes[-1]]]])
            assert walked == nodes


def check_state(state, expected):
    assert state.viewpoint == expected["viewpointId"]
    assert state.number == expected["ix"]
    assert list(state.position) == expected["position"]  # float32, every bit
    assert state.heading == pytest.approx(expected["heading"], abs=1e-14)
    assert state.elevation == pytest.approx(expected["elevation"], abs=1e-14)
    assert state.view_index == expected["viewIndex"]
    assert state.step == expected["step"]
    assert [(row.viewpoint, row.number) for row in state.navigable] == [tuple(r[:2]) for r in expected["navigable"]]
    for row, (_, _, heading, elevation, distance) in zip(state.navigable, expected["navigable"], strict=True):
        assert row.rel_heading == pytest.approx(heading, abs=ANGLE)
        assert row.rel_elevation == pytest.approx(elevation, abs=1e-14)
        assert row.rel_distance == distance  # float32, every bit


def simulator_of(config, graphs):
    limits = config.get("elevation_limits")
    return Simulator(
        graphs,
        Camera(config.get("width", 640), config.get("height", 480), math.radians(config.get("vfov_deg", 60))),
        config.get("discretized", True),
        config.get("restricted_navigation", True),
        (-0.94, 0.94) if not isinstance(limits, list) else (limits[0], limits[1]),
    )


def run_navigable(meta, graphs, path):
    for number, config in enumerate(meta["configs"]):
        cases = [case for case in meta["cases"] if case["config"] == number]
        simulator = simulator_of(config, graphs)
        simulator.new_episodes(*([case[name] for case in cases] for name in START))
        for state, case in zip(simulator.states(), cases, strict=True):
            check_state(state, case["state"])


START = ("scan", "start", "set_heading", "set_elevation")
# As the description of the file says.
ACTION_CONFIGS = [{}, {"discretized": False, "elevation_limits": [math.radians(-40), math.radians(50)]}]


def run_actions(meta, graphs, path):
    configs = meta.get("configs", ACTION_CONFIGS)
    for number, config in enumerate(configs):
        sequences = [sequence for sequence in meta["sequences"] if sequence["config"] == number]
        for batch in (sequences, *([sequence] for sequence in sequences)):  # together, then one by one
            if not batch:
                continue
            simulator = simulator_of(config, graphs)
            simulator.new_episodes(*([sequence[name] for sequence in batch] for name in START))
            for steps in zip(*(sequence["trace"] for sequence in batch), strict=True):
                if steps[0]["action"] is not None:
                    simulator.make_actions(*zip(*(step["action"] for step in steps), strict=True))
                for state, step in zip(simulator.states(), steps, strict=True):
                    check_state(state, step["state"])
    for error in meta.get("errors", []):
        check_error(error, meta, graphs)


def check_error(error, meta, graphs):
    simulator = Simulator(graphs)
    first = meta["sequences"][0]
    case = error["case"]
    if "excluded" in case:
        excluded = meta["excluded_viewpoint"]
        scan = next(scan for scan in graphs if excluded in graphs[scan].index)
        with pytest.raises(UserError, match=rf"viewpoint {excluded} of scan {scan} is excluded"):
            simulator.new_episodes([scan], [excluded], [0.0], [0.0])
    elif "unknown viewpoint" in case:
        with pytest.raises(UserError, match="viewpoint 'deadbeef' is not in the graph"):
            simulator.new_episodes([first["scan"]], ["deadbeef"], [0.0], [0.0])
    elif "unknown scan" in case:
        with pytest.raises(UserError, match="scan 'nowhere': no file"):
            simulator.new_episodes(["nowhere"], [first["start"]], [0.0], [0.0])
    else:
        assert "out of range" in case, case
        simulator.new_episodes(*([first[name]] for name in START))
        with pytest.raises(UserError, match="action index 99 of agent 0"):
            simulator.make_actions([99], [0.0], [0.0])


def run_panorama(meta, graphs, path):
    for scan, viewpoints in meta.get("candidates", {}).items():
        panorama = Panorama(graphs[scan])
        for viewpoint, expected in viewpoints.items():
            found = panorama.candidates(viewpoint)
            assert [list(candidate[:3]) for candidate in found] == [row[:3] for row in expected]
            for candidate, row in zip(found, expected, strict=True):
                np.testing.assert_allclose(candidate[3:], row[3:5], rtol=0, atol=ANGLE)
    for case in meta.get("relative", []):
        found = Panorama(graphs[case["scan"]]).candidates(case["viewpoint"])
        base = view_heading(case["viewIndex"]), view_elevation(case["viewIndex"])
        assert [candidate.viewpoint for candidate in found] == [row["viewpointId"] for row in case["candidates"]]
        for candidate, row in zip(found, case["candidates"], strict=True):
            assert (candidate.view, candidate.row) == (row["pointId"], row["idx"])
            angles = candidate.heading - base[0], candidate.elevation - base[1]
            np.testing.assert_allclose(angles, (row["heading"], row["elevation"]), rtol=0, atol=ANGLE)
            np.testing.assert_allclose(angle_features(*angles), row["angle_feature"], rtol=0, atol=ANGLE)
    for file in path.parent.glob("*.safetensors"):
        tensors = load_file(file)
        if set(tensors) <= {"orist", "duet"}:
            check_angle_features(tensors)


def check_angle_features(tensors):
    for name, expected in tensors.items():
        if name in ("orist", "duet"):
            features = view_angle_features(relative_elevation=name == "duet", size=expected.shape[-1])
            np.testing.assert_allclose(features, np.asarray(expected), rtol=0, atol=1.2e-7)


def run_text(meta, graphs, path):
    words = WordTokenizer(meta.get("vocab", ["<PAD>", "<UNK>", "<EOS>"]), 10)
    orist = WordTokenizer(meta.get("vocab", ["<PAD>", "<UNK>", "<EOS>"]), 10, begin=True)
    for case in meta.get("word", []):
        assert split_sentence(case["sentence"]) == case["split"]
        assert words.encode(case["sentence"]) == case["encode_reversed_len10"]
    if "orist_vocab_size" in meta:
        assert len(orist.index) == meta["orist_vocab_size"]
    for case in meta.get("orist_word", []):
        if case["encode_len10"] is None:
            with pytest.raises(UserError, match="empty sentence"):
                orist.encode(case["sentence"])
        else:
            assert orist.encode(case["sentence"]) == case["encode_len10"]
    pieces = meta.get("wordpiece_vocab", {})
    for case in meta.get("wordpiece", []):
        ids = WordPieces(sorted(pieces, key=pieces.get), case["max_len"]).encode(case["text"])
        assert len(ids) == case["length"]
        for name in ("ids", "ids_ndh"):
            assert [*ids, *[0] * (case["max_len"] - len(ids))] == case.get(name, case["ids"])


def read_back(content, read):
    """What `read` makes of `content` in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.json")
        path.write_text(json.dumps(content))
        return read(path)


def check_table(evaluation, expected, names):
    for row, id in enumerate(evaluation.ids):
        for official, name in names.items():
            if official in expected[id]:
                close(evaluation.table[name][row], expected[id][official])


def check_summary(evaluation, expected, names, scale=1.0, tolerance=EXACT):
    for official, name in names.items():
        if official in expected:
            factor = 1.0 if name in ("TL", "NE", "OE", "GP", "steps") else scale
            value = evaluation.summary.get(name, float(evaluation.table[name].mean()))
            close(factor * value, expected[official], tolerance)


OFFICIAL = {
    "nav_error": "NE", "oracle_error": "OE", "length": "TL", "shortest": "shortest", "spl": "SPL", "success": "SR",
    "oracle_success": "OSR", "rgs": "RGS", "rgspl": "RGSPL", "goal_progress": "GP", "oracle_plan_error": "OPE",
}  # fmt: skip
OFFICIAL_SUMMARY = {
    "length": "TL", "nav_error": "NE", "oracle success_rate": "OSR", "success_rate": "SR", "spl": "SPL", "rgs": "RGS",
    "rgspl": "RGSPL", "dist_to_end_reduction": "GP", "oracle path_success_rate": "OPSR",
}  # fmt: skip
DUET = {
    "nav_error": "NE", "oracle_error": "OE", "action_steps": "steps", "trajectory_steps": "steps",
    "trajectory_lengths": "TL", "success": "SR", "spl": "SPL", "oracle_success": "OSR", "DTW": "DTW", "nDTW": "nDTW",
    "SDTW": "sDTW", "CLS": "CLS", "rgs": "RGS", "rgspl": "RGSPL",
}  # fmt: skip
DUET_SUMMARY = {
    "action_steps": "steps", "steps": "steps", "lengths": "TL", "nav_error": "NE", "oracle_error": "OE", "sr": "SR",
    "oracle_sr": "OSR", "spl": "SPL", "nDTW": "nDTW", "SDTW": "sDTW", "CLS": "CLS", "rgs": "RGS", "rgspl": "RGSPL",
}  # fmt: skip
ORIST_SUMMARY = {
    "lengths": "TL", "length": "TL", "nav_error": "NE", "oracle_error": "OE", "oracle_rate": "OSR", "spl": "SPL",
    "success_rate": "SR", "success": "SR", "goal_progress": "GP", "oracle_success": "OSR",
    "oracle_path_success": "OPSR",
}  # fmt: skip


def run_r2r(meta, graphs, path):
    if "items" in meta:
        episodes = read_back(meta["items"], lambda file: read_r2r(file, "case"))
        ids = [episode.id for episode in episodes]
        records, notes = read_back(meta["predictions"], lambda file: read_submission(file, ids))
        assert notes == []
        evaluation = R2REvaluator(episodes, graphs).evaluate(records)
        check_table(evaluation, meta["official"]["per_instruction"], OFFICIAL)
        check_summary(evaluation, meta["official"].get("summary", {}), OFFICIAL_SUMMARY)
        check_summary(evaluation, meta.get("orist_summary", {}), ORIST_SUMMARY, tolerance=FLOAT32_SUMS)
        for kind, expected in meta.get("duet", {}).items():
            evaluation = R2REvaluator(episodes, graphs, "duet", keep_repeats=kind == "raw").evaluate(records)
            check_table(evaluation, expected["per_instruction"], DUET)
            check_summary(evaluation, expected.get("summary", {}), DUET_SUMMARY, scale=100)
    for case in meta.get("duet_edge_cases", {}).get("cases", []):
        episode = Episode("0_0", "case", meta["duet_edge_cases"]["scan"], tuple(case["gt"]), 0.0, "")
        evaluation = R2REvaluator([episode], graphs, "duet", keep_repeats=True).evaluate(
            {"0_0": {"trajectory": case["pred"]}}
        )
        check_table(evaluation, {"0_0": case["result"]}, DUET)
    if "official_edge_cases" in meta:
        check_official_edge_cases(meta["official_edge_cases"], graphs)


def check_official_edge_cases(edge, graphs):
    a, b, far, scan = (edge["nodes"][name] for name in ("a", "b", "nonadjacent", "scan"))
    # Words of the case: annotated path, predicted path, and what the error says instead of the official one's text.
    setups = {
        "gt start==goal, prediction stays": ([a], [a], "the official SPL divides by zero"),
        "gt start==goal, prediction leaves": ([a], [a, b, a], None),
        "does not begin at the gt start": ([a, b], [b], "the trajectory begins at"),
        "teleports": ([a, b], [a, far], "expected neighbours"),
        "instruction missing": ([a, b], [a, b], "no trajectory for 1 of 3 instructions, the first is '1_2'"),
        "duplicate": ([a, b], [a, b], None),
        "4 instructions": ([a, b], [a, b], None),
    }
    for case in edge["cases"]:
        words = next(words for words in setups if words in case["case"])
        annotated, predicted, message = setups[words]
        count = 4 if words.startswith("4") else 3
        episodes = [Episode(f"1_{k}", "case", scan, tuple(annotated), 0.0, "") for k in range(count)]
        entries = [{"instr_id": f"1_{k}", "trajectory": [[node, 0.0, 0.0] for node in predicted]} for k in range(3)]
        if words == "instruction missing":
            del entries[-1]
        if words == "duplicate":
            entries += [{"instr_id": id, "trajectory": [[far, 0.0, 0.0]]} for id in ("1_0", "9_0")]
        records, _ = read_back(entries, lambda file: read_submission(file, ["1_0", "1_1", "1_2"]))
        evaluator = R2REvaluator(episodes, graphs)
        if "raises" in case:
            with pytest.raises(UserError, match=message):
                evaluator.evaluate(records)
        else:
            check_summary(evaluator.evaluate(records), case["result"], OFFICIAL_SUMMARY)


def run_reverie(meta, graphs, path):
    visible = visible_objects(meta["bbox"], path)
    episodes = read_back(meta["items"], lambda file: read_reverie(file, "case", visible))
    records, _ = read_back(meta["predictions"], lambda file: read_submission(file, [e.id for e in episodes]))
    evaluation = REVERIEEvaluator(episodes, graphs).evaluate(records)
    check_table(evaluation, meta["official"]["per_instruction"], OFFICIAL)
    for name in ("summary", "summary_nav_only"):
        check_summary(evaluation, meta["official"].get(name, {}), OFFICIAL_SUMMARY)
    check_summary(evaluation, meta.get("orist_summary", {}), ORIST_SUMMARY, tolerance=FLOAT32_SUMS)
    if "duet" in meta:
        evaluation = REVERIEEvaluator(episodes, graphs, "duet").evaluate(records)
        check_table(evaluation, meta["duet"]["per_instruction"], DUET)
        check_summary(evaluation, meta["duet"].get("summary", {}), DUET_SUMMARY, scale=100)


def run_ndh(meta, graphs, path):
    for kind, supervision in (("planner_path", "oracle"), ("player_path", "navigator"), ("trusted_path", "mixed")):
        episodes = read_back(meta["items"], lambda file, s=supervision: read_ndh(file, "case", s))
        if supervision == "mixed":
            assert {episode.id: list(episode.path) for episode in episodes} == meta["trusted_paths"]
        if kind not in meta["official"]:
            continue
        ids = [episode.id for episode in episodes]
        records, _ = read_back(meta["predictions"][kind], lambda file, ids=ids: read_submission(file, ids))
        evaluation = NDHEvaluator(episodes, graphs).evaluate(records)
        check_table(evaluation, meta["official"][kind]["per_instance"], OFFICIAL)
        check_summary(evaluation, meta["official"][kind].get("summary", {}), OFFICIAL_SUMMARY)
        orist = meta.get("orist_summary", {}).get(supervision, {})
        check_summary(evaluation, orist, ORIST_SUMMARY, tolerance=FLOAT32_SUMS)
