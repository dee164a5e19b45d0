import json
import pickle
import sys

import numpy as np
import pytest

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.features import NumpyObjects, ViewFeatures, open_objects, view_key
from tasks.navigation.rooms import Rooms, read_rooms
from tasks.navigation.world import World

h5py = pytest.importorskip("h5py")
KEY = view_key("scan", "a", 7)
FEATURES = np.arange(6, dtype=np.float32).reshape(2, 3)
BOXES = np.array([[0.1, 0.2, 0.5, 0.4, 0.08], [0, 0, 1, 1, 1]], dtype=np.float32)


def write_group(file, features=FEATURES, boxes=BOXES, label=b"sofa#bed"):
    group = file.create_group(KEY)
    group["region_feat"] = features
    group["region_loc"] = boxes
    if label is not None:
        group["region_label"] = label


def one_file(folder):
    with h5py.File(folder / "objects.h5", "w") as file:
        write_group(file)
    return folder / "objects.h5"


def file_per_view(folder):
    (folder / "views").mkdir()
    with h5py.File(folder / "views" / f"{KEY}.h5", "w") as file:
        write_group(file)
    return folder / "views"


def arrays(folder):
    (folder / "arrays").mkdir()
    np.save(folder / "arrays/features.npy", FEATURES.astype(np.float16))
    np.save(folder / "arrays/boxes.npy", BOXES)
    (folder / "arrays/index.json").write_text(json.dumps({KEY: [0, 2]}))
    (folder / "arrays/labels.json").write_text(json.dumps(["sofa", "bed"]))
    return folder / "arrays"


@pytest.mark.parametrize("layout", [one_file, file_per_view, arrays])
def test_every_layout_gives_the_same_objects(layout, tmp_path):
    store = open_objects(layout(tmp_path))
    for opened in (store, pickle.loads(pickle.dumps(store))):  # data loaders send it to their workers
        assert opened.feature_dim == 3
        found = opened.view("scan", "a", 7)
        np.testing.assert_array_equal(found.features, FEATURES)
        np.testing.assert_allclose(found.boxes[0], [0.1, 0.2, 0.5, 0.4, 0.4, 0.2, 0.08], rtol=1e-6)
        assert list(found.labels) == ["sofa", "bed"]
        assert found.features.dtype == found.boxes.dtype == np.float32
        assert opened.view("scan", "a", 8) is None
        assert opened.view("other", "a", 7) is None
        opened.close()


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: not found"):
        open_objects(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no HDF5 file"):
        open_objects(tmp_path / "empty")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(DataError, match=r"text.h5: cannot be read as HDF5"):
        open_objects(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(DataError, match="expected groups <scan>_<viewpoint>_<view>"):
        open_objects(tmp_path / "other.h5")
    with h5py.File(tmp_path / "short.h5", "w") as file:
        write_group(file, boxes=BOXES[:1])
    with pytest.raises(DataError, match=rf"{KEY}: 2 features and 1 boxes"):
        open_objects(tmp_path / "short.h5").view("scan", "a", 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("features.npy", np.array([{}], dtype=object), "features.npy: cannot be read as a NumPy array"),
        ("features.npy", np.zeros(3), "expected an array of numbers with 2 dimensions"),
        ("features.npy", np.zeros((3, 3)), "3 features, 2 boxes"),
        ("boxes.npy", np.zeros((2, 3)), r"boxes of shape \(2, 3\); expected \(n, 4 or more\)"),
        ("index.json", {KEY: [1, 2]}, rf"{KEY}: \[1, 2\]; expected \[first row, number of rows\] of 2 rows"),
        ("labels.json", ["sofa"], "1 names; expected 2"),
    ],
)
def test_unusable_arrays_are_named(name, content, message, tmp_path):
    folder = arrays(tmp_path)
    if name.endswith(".npy"):
        np.save(folder / name, content, allow_pickle=True)
    else:
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        NumpyObjects(folder)


def test_a_view_without_objects_shows_the_whole_image(tmp_path, make_graph):
    folder = arrays(tmp_path)
    (folder / "index.json").write_text(json.dumps({KEY: [0, 0]}))
    whole = np.random.default_rng(0).random((36, 5)).astype(np.float32)
    (tmp_path / "whole").mkdir()
    np.save(tmp_path / "whole/scan_a.npy", whole)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["scan_a"] = whole
    graphs = {"scan": make_graph([(0, 1)])}
    for path in (tmp_path / "whole", tmp_path / "whole.h5"):
        world = World(graphs, open_objects(folder), pickle.loads(pickle.dumps(ViewFeatures(path, 3))))
        sight = world.sight("scan", "a", 7)
        np.testing.assert_array_equal(sight.features, whole[7:8, :3])
        assert sight.boxes.tolist() == [[0, 0, 1, 1, 1, 1, 1]]
        assert ViewFeatures(path, 3).viewpoint("scan", "b") is None
        with pytest.raises(DataError, match=r"scan_a: shape \(36, 5\); expected \(36, 6 or more\)"):
            ViewFeatures(path, 6).viewpoint("scan", "a")
    assert not World(graphs, open_objects(folder)).sight("scan", "a", 7).features.any()


def test_the_best_objects_are_used(tmp_path, make_graph):
    world = World({"scan": make_graph([(0, 1)])}, open_objects(arrays(tmp_path)), max_objects=1)
    assert list(world.sight("scan", "a", 7).labels) == ["sofa"]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    path = one_file(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install 'frugal-vision\[navigation\]'"):
        open_objects(path)


def test_rooms(tmp_path):
    path = tmp_path / "house_panos_gt.json"
    with pytest.warns(UserWarning, match=r"not found; the losses of the room heads are left out"):
        assert read_rooms(path).of("scan", "a") == -100
    path.write_text(json.dumps({"scan": {"a": 10}}))
    rooms = read_rooms(path)
    assert isinstance(rooms, Rooms)
    assert rooms.names[rooms.of("scan", "a")] == "kitchen"
    assert rooms.of("scan", "b") == rooms.of("other", "a") == -100
    for content, message in [
        ({"scan": {"a": 31}}, "scan: a: 31; expected a class from 0 to 30"),
        ({"scan": [1]}, "scan: expected"),
        ([1], "expected {scan: {viewpoint: class}}"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            read_rooms(path)
