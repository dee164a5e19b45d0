import json
import shutil

import pytest

from tasks.core.data import DataError
from tasks.navigation.data import NDH, R2R, REVERIE, SampleHouses
from tasks.navigation.episodes import dialogue, read_ndh, read_r2r, read_reverie, supervised_path, visible_objects
from tasks.navigation.submission import read_submission, submission

R2R_ENTRY = {
    "distance": 7.0,
    "scan": "scan",
    "path_id": 4,
    "path": ["a", "b", "c"],
    "heading": 1.5,
    "instructions": ["Walk to the sofa.", "Go.", "Stop."],
}
REVERIE_ENTRY = {**R2R_ENTRY, "id": "4_17", "objId": 17}
NDH_ENTRY = {
    "inst_idx": 9,
    "scan": "scan",
    "target": "sofa",
    "start_pano": {"heading": 0.5, "elevation": 19.0, "pano": "a"},
    "dialog_history": [
        {"role": "navigator", "message": "left?"},
        {"role": "oracle", "message": "yes"},
        {"role": "navigator", "message": "now?"},
        {"role": "oracle", "message": "right"},
    ],
    "end_panos": ["c", "d"],
    "player_path": ["a", "b", "c"],
    "planner_path": ["a", "b"],
}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def copy(houses, tmp_path):
    """A copy of the houses that may be changed."""
    shutil.copytree(houses, tmp_path / "copy")
    return tmp_path / "copy"


def test_r2r_has_an_episode_per_instruction(tmp_path):
    episodes = read_r2r(write(tmp_path / "R2R.json", [R2R_ENTRY]), "train")
    assert [episode.id for episode in episodes] == ["4_0", "4_1", "4_2"]
    assert episodes[0].key == "train/4_0"
    assert (episodes[1].instruction, episodes[1].start, episodes[1].goal, episodes[1].heading) == ("Go.", "a", "c", 1.5)
    hidden = {name: R2R_ENTRY[name] for name in R2R_ENTRY if name != "distance"} | {"path": ["a"]}
    assert not any(episode.has_goal for episode in read_r2r(write(tmp_path / "R2R.json", [hidden]), "test"))


def test_reverie_knows_from_where_its_object_is_visible(tmp_path):
    box = {"name": "sofa", "visible_pos": [3], "bbox2d": [[0, 0, 5, 5]]}
    hidden = {"name": "sofa", "visible_pos": [], "bbox2d": []}
    release = {"scan_a": {"a": {"17": hidden}}, "scan_b": {"b": {"17": box, "18": box}}, "scan_c": {"c": {}}}
    merged = {key: next(iter(objects.values())) for key, objects in release.items()}
    for boxes in (release, merged):  # as files of the release, and as DUET merges them
        visible = visible_objects(boxes, tmp_path)
        episode, *others = read_reverie(write(tmp_path / "REVERIE.json", [REVERIE_ENTRY]), "train", visible)
        assert (episode.id, len(others)) == ("4_17_0", 2)
        assert (episode.target, episode.target_views) == ("17", {"b"})
    test_entry = {name: value for name, value in REVERIE_ENTRY.items() if name != "objId"} | {"id": 31, "path": ["a"]}
    episode = read_reverie(write(tmp_path / "REVERIE.json", [test_entry]), "test", None)[0]
    assert (episode.id, episode.has_goal, episode.target) == ("31_0", False, None)


def test_ndh_supervision_and_history(tmp_path):
    path = write(tmp_path / "train.json", [NDH_ENTRY])
    paths = {kind: read_ndh(path, "train", kind)[0].path for kind in ("oracle", "navigator", "mixed")}
    assert paths == {"oracle": ("a", "b"), "navigator": ("a", "b", "c"), "mixed": ("a", "b", "c")}
    episode = read_ndh(path, "train", "oracle")[0]
    assert (episode.id, episode.heading, episode.end_region, episode.planner_path) == ("9", 0.5, ("c", "d"), ("a", "b"))
    assert episode.instruction == "left? [sep] yes [sep] now? [sep] right [sep] sofa"
    texts = {kind: read_ndh(path, "train", "oracle", kind)[0].instruction for kind in HISTORIES}
    assert texts == HISTORIES
    assert supervised_path(["a", "b"], ["a", "d"], "mixed") == ("a", "b")
    assert supervised_path(["a"], ["a", "d"], "mixed") == ("a",)  # the player's start does not count
    assert dialogue([], "sofa", "all") == dialogue([], "sofa", "oracle_ans") == "sofa"


HISTORIES = {
    "target": "sofa",
    "oracle_ans": "right [sep] sofa",
    "nav_q_oracle_ans": "now? [sep] right [sep] sofa",
}


def test_ndh_in_the_format_of_orist(tmp_path):
    entry = {
        "path_id": 9,
        "scan": "scan",
        "heading": 0.5,
        "instructions": "left? [sep] yes [sep] sofa",
        "path": ["a", "b", "c"],
        "player_path": ["a", "b", "c"],
        "planner_path": ["a", "b"],
        "end_panos": ["c"],
    }
    episode = read_ndh(write(tmp_path / "NDH_train.json", [entry]), "train", "oracle")[0]
    assert (episode.id, episode.path, episode.instruction) == ("9", ("a", "b"), "left? [sep] yes [sep] sofa")


@pytest.mark.parametrize(
    ("read", "entry", "message"),
    [
        (read_r2r, [1], "entry 0: expected an object, got int"),
        (read_r2r, {}, "expected a list of annotations"),
        (read_r2r, [R2R_ENTRY | {"path": []}], r"entry 0: path: \[\]; expected a list of texts"),
        (read_r2r, [R2R_ENTRY | {"heading": "north"}], r'entry 0: heading: "north"; expected an angle'),
        (read_r2r, [{"scan": "scan"}], "entry 0: path_id: is missing; expected an id"),
        (read_r2r, [R2R_ENTRY, R2R_ENTRY], "instruction id '4_0' occurs twice"),
        (lambda p, s: read_reverie(p, s, None), [R2R_ENTRY], "entry 0: id: is missing"),
        (lambda p, s: read_ndh(p, s, "oracle"), [NDH_ENTRY | {"start_pano": {}}], "entry 0: pano: is missing"),
        (
            lambda p, s: read_ndh(p, s, "oracle"),
            [NDH_ENTRY | {"planner_path": ["b", "c"]}],
            "entry 0: start_pano: a; expected b, where the path begins",
        ),
    ],
)
def test_what_is_wrong_with_an_annotation_is_named(read, entry, message, tmp_path):
    path = write(tmp_path / "annotation.json", entry)
    with pytest.raises(DataError, match=message) as error:
        read(path, "train")
    assert str(path) in str(error.value)


def test_the_sample_is_ready_to_train_on(house_data):
    house_data.setup("fit")
    train = house_data.train_dataset()
    assert len(train) == 120
    assert train[0].tokens[0] == house_data.tokenizer.pieces.index("[CLS]")
    assert train[len(train)] == train[0]  # the next pass over the data
    assert [e.split for e in house_data.val_dataset().episodes] == ["val_seen"] * 24 + ["val_unseen"] * 72
    assert (house_data.feature_dim, house_data.num_rooms) == (32, 31)
    assert house_data.vocab_size == len(house_data.tokenizer)
    batch = next(iter(house_data.train_dataloader()))
    assert [episode.split for episode in batch] == ["train"] * 32
    short = SampleHouses(house_data.root, min_path_nodes=6)
    assert {len(episode.path) for episode in short.train_dataset().episodes} == {6}


def test_other_layouts_are_found(copy, tmp_path):
    entries = json.loads((copy / "R2R_train.json").read_text())
    nodes = entries[0]["path"]
    write(copy / "REVERIE_train.json", [entries[0] | {"id": "1_5", "objId": 5}])
    (copy / "BBox").mkdir()
    key = f"{entries[0]['scan']}_{nodes[-1]}"
    write(
        copy / "BBox" / f"{key}.json", {nodes[-1]: {"5": {"name": "bed", "visible_pos": [0], "bbox2d": [[0, 0, 1, 1]]}}}
    )
    assert REVERIE(str(copy)).samples("train")[0].target_views == {nodes[-1]}
    start = {"heading": 0.0, "elevation": 1.0, "pano": nodes[0]}
    ndh = NDH_ENTRY | {"scan": entries[0]["scan"], "start_pano": start, "end_panos": nodes[-1:]}
    write(copy / "train.json", [ndh | {"planner_path": nodes[:2], "player_path": nodes}])
    assert NDH(str(copy)).samples("train")[0].path == tuple(nodes)
    assert NDH(str(copy), supervision="oracle").samples("train")[0].path == tuple(nodes[:2])


def test_missing_files_stop_with_the_layout(copy):
    for path, message in [
        ("R2R_val_seen.json", r"R2R_val_seen.json: file not found.\nExpected layout:"),
        ("vocab.txt", r"vocab.txt: file not found.\nExpected layout:"),
        ("objects", r"objects: not found.\nExpected layout:"),
        ("connectivity", r"connectivity: folder not found.\nExpected layout:"),
    ]:
        (copy / path).rename(copy / "elsewhere")
        with pytest.raises(DataError, match=message) as error:
            R2R(str(copy)).setup("fit")
        assert "configs/sample/orist.yaml" in str(error.value)
        (copy / "elsewhere").rename(copy / path)
    (copy / "connectivity/house001_connectivity.json").unlink()
    with pytest.raises(DataError, match="scan 'house001': no file"):
        R2R(str(copy)).setup("fit")
    with pytest.raises(DataError, match=r"BBoxes.json: file not found"):
        _ = REVERIE(str(copy)).visible


def test_files_stay_inside_the_root(copy):
    for option, message in (("objects", "data.objects"), ("vocabulary", "data.vocabulary"), ("name", "data.name")):
        data = R2R(str(copy), **{option: "../copy/../secret"})
        with pytest.raises(DataError, match=rf"{message}: '../copy/../secret.*' leads out of"):
            data.setup("fit")


def test_a_data_set_without_rooms_only_warns(copy):
    (copy / "house_panos_gt.json").unlink()
    data = R2R(str(copy))
    with pytest.warns(UserWarning, match="the losses of the room heads are left out"):
        data.setup("fit")
    seen = data.environment().reset(data.samples("train")[:2])
    assert seen.next_room.tolist() == [-100, -100]


def test_submissions_are_read_back(tmp_path):
    records = {
        "10_0": {"trajectory": [["a", 0.123456789, 0.0], ["b", 1.0, -0.5]], "object": "17"},
        "9_1": {"trajectory": [["a", 0.0, 0.0]], "object": None},
    }
    for dataset, key in (("r2r", "instr_id"), ("reverie", "instr_id"), ("ndh", "inst_idx")):
        given = {id.partition("_")[0] if dataset == "ndh" else id: record for id, record in records.items()}
        name, content = submission(dataset, "test", given)
        assert name == f"submit_{dataset}_test.json"
        entries = json.loads(content)
        assert [entry[key] for entry in entries] == ([9, 10] if dataset == "ndh" else ["9_1", "10_0"])
        assert entries[1]["trajectory"][0] == ["a", 0.123457, 0.0]
        assert [entry.get("predObjId") for entry in entries] == ([None, 17] if dataset == "reverie" else [None, None])
        (tmp_path / name).write_bytes(content)
        read, notes = read_submission(tmp_path / name, list(given))
        assert notes == []
        assert {id: [row[0] for row in record["trajectory"]] for id, record in read.items()} == {
            id: [row[0] for row in record["trajectory"]] for id, record in given.items()
        }


def test_the_first_of_several_entries_counts_and_unknown_ones_are_ignored(tmp_path):
    entries = [
        {"instr_id": id, "trajectory": [[node, 0, 0]]} for id, node in (("1_0", "a"), ("1_0", "b"), ("2_0", "c"))
    ]
    records, notes = read_submission(write(tmp_path / "submit.json", entries), ["1_0"])
    assert records["1_0"]["trajectory"] == [["a", 0, 0]]
    assert ["1 entries repeat an id" in notes[0], "1 entries are of ids" in notes[1]] == [True, True]
    for content, message in [
        ({}, "expected a list of trajectories, got dict"),
        ([{"instr_id": "1_0"}], "entry 0: expected an object with an id and a list as trajectory"),
        ([{"trajectory": []}], "entry 0: expected instr_id"),
        ([{"instr_id": "7_0", "trajectory": []}], "none of its 1 ids is in the split; the first is '7_0'"),
    ]:
        with pytest.raises(Exception, match=message):
            read_submission(write(tmp_path / "submit.json", content), ["1_0"])
