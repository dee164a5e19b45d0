import filecmp
import json
from collections import Counter

import numpy as np

from tasks.navigation.data import SampleHouses
from tasks.navigation.sample import DECORATION, FURNITURE, OBJECTS, write_sample
from tasks.navigation.sightlines import Panorama


def entries(root, split):
    return json.loads((root / f"R2R_{split}.json").read_text())


def test_several_goals_from_one_start_lie_out_of_reach_of_each_other(houses, house_data):
    """Whoever does not read cannot know which goal is meant, and no goal is within 3 m of another."""
    for split in ("train", "val_unseen"):
        goals = {}
        for entry in entries(houses, split):
            graph = house_data.graphs[entry["scan"]]
            goals.setdefault((entry["scan"], entry["path"][0]), []).append(entry["path"][-1])
            assert graph.shortest_path(entry["path"][0], entry["path"][-1]) == entry["path"]
            assert 3 <= len(entry["path"]) <= 6
        assert min(map(len, goals.values())) >= 5
        for graph in house_data.graphs.values():
            apart = graph.distances[~np.eye(len(graph), dtype=bool)]
            assert apart.min() > 3.0
            assert np.isfinite(apart).all()


def test_seen_and_unseen_houses(houses):
    scans = {
        split: {entry["scan"] for entry in entries(houses, split)} for split in ("train", "val_seen", "val_unseen")
    }
    assert scans["train"] == scans["val_seen"] == {"house000", "house001"}
    assert scans["val_unseen"] == {"house002"}
    ids = Counter(entry["path_id"] for split in scans for entry in entries(houses, split))
    assert set(ids.values()) == {1}


def test_instructions_name_what_is_seen_on_the_way(houses, house_data):
    """The landmark of each next viewpoint is in the view towards it, and in that of no other neighbour."""
    store = house_data.object_store
    for entry in entries(houses, "val_unseen"):
        panorama = Panorama(house_data.graphs[entry["scan"]])
        words = [word for word in entry["instructions"][0].split() if word in OBJECTS]
        assert len(words) == len(entry["path"]) - 1
        assert not set(words) & set(DECORATION)
        for here, there, word in zip(entry["path"][:-1], entry["path"][1:], words, strict=True):
            for candidate in panorama.candidates(here):
                labels = store.view(entry["scan"], here, candidate.view).labels
                assert (word in labels) == (candidate.viewpoint == there)


def test_features_tell_what_an_object_is(house_data):
    store = house_data.object_store
    labels = np.array(store._labels)
    means = {label: store.features[labels == label].mean(axis=0) for label in sorted(set(labels))}
    names = list(means)
    nearest = np.argmin(((store.features[:, None] - np.stack(list(means.values()))) ** 2).sum(-1), axis=1)
    assert (np.array(names)[nearest] == labels).all()
    assert {name for furniture in FURNITURE.values() for name in furniture} >= set(names) - set(DECORATION)


def test_the_same_seed_writes_the_same_files(houses, tmp_path):
    write_sample(tmp_path / "again", num_train=2, num_unseen=1)
    write_sample(tmp_path / "other", num_train=2, num_unseen=1, seed=1)
    names = ["R2R_train.json", "objects/features.npy", "objects/index.json", "connectivity/house000_connectivity.json"]
    assert filecmp.cmpfiles(houses, tmp_path / "again", names, shallow=False) == (names, [], [])
    assert filecmp.cmpfiles(houses, tmp_path / "other", names, shallow=False)[1] == names


def test_the_sample_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = SampleHouses(num_train=1, num_unseen=1)
    data.prepare_data()
    before = (tmp_path / "frugal").glob("navigation-*/R2R_train.json")
    times = [path.stat().st_mtime_ns for path in before]
    data.prepare_data()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "frugal").glob("navigation-*/R2R_train.json")] == times
    assert len(times) == 1
