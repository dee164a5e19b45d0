"""What the tests of detection share: small scenes, and a copy of them to damage."""

import json
import shutil

import pytest


@pytest.fixture(scope="session")
def task():
    return "detection"


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory):
    """13 training and 13 validation scenes of handwritten digits in the layout of COCO; not to be changed."""
    from tasks.detection.sample import write_sample

    root = tmp_path_factory.mktemp("data") / "tiny"
    write_sample(root, 13, 13, image_size=48)
    return root


@pytest.fixture
def damaged(tiny_coco, tmp_path):
    """Copies the data, lets a function change the content of an annotation file, and returns (root, file)."""

    def copy(change=lambda content: None, split="val"):
        root = tmp_path / "damaged"
        shutil.copytree(tiny_coco, root, dirs_exist_ok=True)
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return root, path

    return copy
