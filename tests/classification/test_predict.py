"""``predict`` writes one CSV file, sorted by image, with the most probable classes."""

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tasks.classification.data import DigitImages, ImageFolder
from tasks.classification.module import Classification

HEADER = ["image", *(f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability"))]


@pytest.fixture
def weights(tmp_path):
    def write(num_classes):
        torch.manual_seed(0)
        model = Classification(num_classes, "test_vit2", img_size=32)
        with torch.no_grad():
            model.network.head.weight.normal_(std=0.5)  # an untrained head makes all classes equal
        torch.save(model.network.state_dict(), tmp_path / "w.pth")
        return model.network.eval()

    return write


def read(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions_of_a_folder(run_cli, tiny_classifier_config, tiny_digits, tmp_path, weights):
    network = weights(10)
    folder = tmp_path / "photos"
    shutil.copytree(tiny_digits / "val", folder)
    for name in ("zwölf, 漢字.png", 'quote".png'):
        shutil.copy(tiny_digits / "val/3/0.png", folder / name)
    config = tiny_classifier_config(tiny_digits)
    args = ["--model.weights=w.pth", f"--data.images={folder}"]
    result = run_cli("predict", "-c", config, *args, "--output=out")
    assert result.code == 0, result.err
    assert "predictions: 1 file in out" in result.out
    assert [path.name for path in Path("out").iterdir()] == ["predictions.csv"]

    header, *rows = read("out/predictions.csv")
    assert header == HEADER
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert [row[0] for row in rows] == names
    assert {"zwölf, 漢字.png", 'quote".png'} < set(names)

    dataset = DigitImages(str(tiny_digits), images=str(folder)).predict_dataset()
    found = {row[0]: row[1:] for row in rows}
    for item in (dataset[i] for i in range(len(dataset))):
        with torch.no_grad():
            probabilities, classes = network(item["image"][None]).softmax(1)[0].topk(5)
        cells = found[item["id"]]
        assert cells[::2] == [str(int(c)) for c in classes]
        assert [float(p) for p in cells[1::2]] == pytest.approx(probabilities.tolist(), abs=2e-6)
        assert all(len(p) == len("0.123456") for p in cells[1::2])
    assert len({row[1] for row in rows}) > 1


def test_fewer_than_five_classes(run_cli, tiny_classifier_config, tmp_path, weights):
    weights(3)
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog, wet", "crane")):
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            image = np.full((40, 30, 3), 80 * number, np.uint8)
            cv2.imwrite(str(tmp_path / "animals" / split / name / "a.png"), image)
    assert ImageFolder(str(tmp_path / "animals")).num_classes == 3
    config = tiny_classifier_config(
        tmp_path / "animals", changes={"data.class_path": "ImageFolder", "data.init_args.image_size": 32}
    )
    result = run_cli("predict", "-c", config, "--model.weights=w.pth", "--output=out")
    assert result.code == 0, result.err
    header, *rows = read("out/predictions.csv")
    assert header == HEADER[:7]
    assert [row[0] for row in rows] == ["cat/a.png", "crane/a.png", "dog, wet/a.png"]
    for row in rows:
        assert set(row[1::2]) == {"cat", "dog, wet", "crane"}
        assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5)
        assert float(row[2]) >= float(row[4]) >= float(row[6])
