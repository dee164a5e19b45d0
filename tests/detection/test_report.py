"""The parts of detection's report: tables against pycocotools, kinds of mistakes, ranking, pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.core.evaluation import Extremes
from tasks.detection.annotations import Categories
from tasks.detection.matching import KINDS, OBJECTS, ErrorCounts, Truth, image_score, match_image
from tasks.detection.report import MAX_OBJECTS, detection_report, small_copies

NAMES = ["cat", "dog", "an animal of a very long name", "never seen"]
CATEGORIES = Categories((1, 3, 7, 9), tuple(NAMES))
PALETTE = [(220, 60, 60), (60, 160, 60), (60, 60, 220), (160, 60, 160)]
CAT, DOG = 0, 1
OF_RECORDS = ("boxes", "labels", "scores", "masks")


def make_record(boxes, labels, scores, masks=None):
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array(labels, np.int64),
        "scores": np.array(scores, np.float32),
        "masks": masks,
    }


def make_truth(boxes, labels, crowd=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Truth(boxes, np.array(labels, np.int64), np.array(crowd or [False] * len(boxes), dtype=bool))


# -- kinds of mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "labels", "kinds"),
    [
        ([[0, 0, 10, 10]], [CAT], ["correct"]),
        ([[0, 0, 10, 10], [0, 0, 10, 9]], [CAT, CAT], ["correct", "duplicate"]),
        ([[0, 0, 10, 4]], [CAT], ["badly localised"]),
        ([[0, 0, 10, 9]], [DOG], ["wrong class"]),
        ([[0, 0, 10, 4]], [DOG], ["other", "missed"]),
        ([[50, 50, 60, 60]], [CAT], ["background", "missed"]),
        ([], [], ["missed"]),
        ([[0, 0, 10, 4], [0, 0, 10, 9]], [CAT, CAT], ["badly localised", "correct"]),
        ([[0, 0, 0, 0]], [CAT], ["background", "missed"]),
    ],
)
def test_every_kind_of_mistake(boxes, labels, kinds):
    scores = np.linspace(0.9, 0.8, len(boxes))
    matches = match_image(make_record(boxes, labels, scores), make_truth([[0, 0, 10, 10]], [CAT]))
    assert [KINDS[kind] for kind in matches.kinds] == [kind for kind in kinds if kind != "missed"]
    assert matches.counts.pop((CAT, OBJECTS)) == 1
    counts = {}
    for (label, kind), number in matches.counts.items():
        counts[KINDS[kind]] = counts.get(KINDS[kind], 0) + number
        assert label == (CAT if KINDS[kind] == "missed" else labels[0])
    assert counts == {kind: kinds.count(kind) for kind in kinds}
    assert matches.found.tolist() == ["correct" in kinds]


def test_objects_go_to_the_best_detections_and_low_scores_are_not_seen():
    truth = make_truth([[0, 0, 10, 10], [0, 0, 10, 8]], [CAT, CAT])
    record = make_record([[0, 0, 10, 8], [0, 0, 10, 9], [40, 40, 50, 50]], [CAT, CAT, CAT], [0.9, 0.8, 0.29])
    matches = match_image(record, truth)
    assert matches.shown.tolist() == [0, 1]
    assert [KINDS[kind] for kind in matches.kinds] == ["correct", "correct"]  # the second takes what is left
    assert matches.found.all()
    assert matches.score == 1


def test_detections_in_crowds_are_nothing_and_crowds_cannot_be_missed():
    truth = make_truth([[0, 0, 100, 100]], [CAT], [True])
    matches = match_image(make_record([[10, 10, 20, 20], [10, 10, 20, 20]], [CAT, DOG], [0.9, 0.9]), truth)
    assert matches.kinds[0] == -1
    assert KINDS[matches.kinds[1]] == "background"
    assert matches.counts == {(DOG, KINDS.index("background")): 1}
    assert matches.found.tolist() == [True]


def test_the_score_orders_images_by_what_went_wrong():
    none = np.zeros(0)
    worst_to_best = [
        image_score(0, 9, none),
        image_score(0, 2, none),
        image_score(0, 0, np.array([0.9, 0.9])),
        image_score(0, 0, np.array([0.9])),
        image_score(0, 0, np.array([0.3])),
        image_score(2, 0, np.array([0.3])),
        image_score(5, 0, np.array([0.3])),
        image_score(1, 0, none),
    ]
    assert worst_to_best == sorted(worst_to_best)
    assert worst_to_best[-1] == 1
    assert np.isnan(image_score(0, 0, none))


def test_counts_add_up_over_images():
    counts = ErrorCounts(4)
    for boxes in ([[0, 0, 10, 10]], [], [[0, 0, 10, 10]]):
        counts.add(
            match_image(make_record(boxes, [CAT] * len(boxes), [0.5] * len(boxes)), make_truth([[0, 0, 10, 10]], [CAT]))
        )
    total = counts.gather()
    assert total[CAT, KINDS.index("correct")] == 2
    assert total[CAT, KINDS.index("missed")] == 1
    assert total[CAT, OBJECTS] == 3
    assert total.sum() == 6


def test_truth_of_annotations():
    annotations = [
        {"bbox": [1, 2, 3, 4], "category_id": 7, "iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"bbox": [0, 0, 9, 9], "category_id": 1, "iscrowd": 1, "segmentation": {"size": [9, 9], "counts": [81]}},
    ]
    truth = Truth.of(annotations, CATEGORIES, with_masks=True)
    assert truth.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 9, 9]]
    assert truth.labels.tolist() == [2, 0]
    assert truth.crowd.tolist() == [False, True]
    assert len(truth.segmentations) == 2
    assert Truth.of([], CATEGORIES, with_masks=False).boxes.shape == (0, 4)


# -- the report -------------------------------------------------------------------------------------------------------


def box_mask(box, size):
    mask = np.zeros(size, dtype=np.uint8, order="F")
    left, top, right, bottom = (round(side) for side in box)
    mask[top:bottom, left:right] = 1
    return rle.encode(mask)


def synthetic(num_images=12, size=(120, 160), seed=0):
    """Annotations of noisy images and what an imperfect detector says about them: (images, annotations, records)."""
    generator = np.random.default_rng(seed)
    images, annotations, records = {}, [], {}
    for number in range(num_images):
        images[number] = torch.from_numpy(generator.integers(60, 200, (3, *size), dtype=np.uint8))
        boxes, labels, scores = [], [], []
        for _ in range(generator.integers(1, 5)):
            corner, extent = generator.integers(0, 70, 2), generator.integers(8, 50, 2)
            box, label = [*corner, *(corner + extent)], int(generator.integers(0, 3))
            x, y, right, bottom = map(int, box)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": CATEGORIES.ids[label], "iscrowd": 0,
                    "bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y),
                    "segmentation": box_mask(box, size),
                }
            )  # fmt: skip
            if generator.random() < 0.8:
                boxes.append(np.array(box) + generator.normal(0, 3, 4))
                labels.append(label if generator.random() < 0.8 else (label + 1) % 3)
                scores.append(generator.uniform(0.3, 1))
        order = np.argsort(-np.array(scores))
        boxes = np.array(boxes).reshape(-1, 4).clip(0, 119)[order]
        masks = [box_mask(box, size) for box in boxes]
        records[number] = make_record(boxes, np.array(labels, dtype=np.int64)[order], np.array(scores)[order], masks)
    return images, annotations, records


def evaluated(images, annotations, records, size, with_masks):
    """What the module keeps of an evaluation, computed by pycocotools; and its twelve numbers by kind."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": size[0], "width": size[1]} for i in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORIES.ids, NAMES, strict=True)],
    }
    coco.createIndex()
    last, stats = {}, {}
    for kind in ("bbox", "segm") if with_masks else ("bbox",):
        results = [
            {"image_id": i, "category_id": CATEGORIES.ids[label], "score": float(score),
             "bbox": [*box[:2], *(box[2:] - box[:2])], **({"segmentation": mask} if kind == "segm" else {})}
            for i, record in records.items()
            for box, label, score, mask in zip(*(record[k] for k in OF_RECORDS), strict=True)
        ]  # fmt: skip
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        last[kind], stats[kind] = evaluation.eval, evaluation.stats
    errors, extremes = ErrorCounts(len(NAMES)), Extremes(3)
    for i, image in images.items():
        truth = Truth.of([a for a in annotations if a["image_id"] == i], CATEGORIES, with_masks)
        record = records[i] if with_masks else {**records[i], "masks": None}
        matches = match_image(record, truth)
        errors.add(matches)
        extremes.add(f"image {i}", matches.score, lambda a=(image, size, record, truth, matches): small_copies(*a))
    best, worst = extremes.gather()
    return {**last, "errors": errors.gather(), "best": best, "worst": worst}, stats


@pytest.fixture(scope="module")
def evaluation():
    return evaluated(*synthetic(), (120, 160), with_masks=True)


@pytest.fixture(scope="module")
def parts(evaluation):
    return detection_report(evaluation[0], NAMES, PALETTE)


def test_class_table_averages_to_the_official_numbers(evaluation, parts):
    _, stats = evaluation
    table = parts.tables[0]
    assert table.columns == [
        "class", "objects", "box AP %", "box AP50 %", "box AP75 %", "box AR %",
        "mask AP %", "mask AP50 %", "mask AP75 %", "mask AR %",
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == NAMES
    numbers = np.array([row[2:] for row in table.rows], dtype=float)
    assert np.isnan(numbers[3]).all()  # a class without objects
    assert table.rows[3][1] == 0
    means = np.nanmean(numbers, axis=0) / 100
    for first, kind in ((0, "bbox"), (4, "segm")):
        np.testing.assert_allclose(means[first : first + 4], stats[kind][[0, 1, 2, 8]], rtol=1e-12)
    assert 0.2 < means[0] < 0.9


def test_size_table_has_the_official_numbers(evaluation, parts):
    _, stats = evaluation
    table = parts.tables[1]
    assert [row[0].split()[0] for row in table.rows] == ["all", "small", "medium", "large"]
    for first, kind in ((1, "bbox"), (3, "segm")):
        for row, (ap, ar) in zip(table.rows, ((0, 8), (3, 9), (4, 10), (5, 11)), strict=True):
            expected = [None if value < 0 else pytest.approx(100 * value) for value in stats[kind][[ap, ar]]]
            assert row[first : first + 2] == expected
    assert table.rows[3][1] is None  # there are no large objects


def test_error_table_counts_every_object_and_detection(parts):
    table = parts.tables[2]
    assert table.columns == ["class", *KINDS]
    assert table.rows[0][0] == "all"
    counts = np.array([row[1:] for row in table.rows])
    assert (counts[0] == counts[1:].sum(axis=0)).all()
    records = synthetic()[2]
    assert counts[0, :-1].sum() == sum(len(record["scores"]) for record in records.values())
    objects = [row[1] for row in parts.tables[0].rows]
    assert objects == [sum(a["category_id"] == id for a in synthetic()[1]) for id in CATEGORIES.ids]
    assert counts[0, 0] + counts[0, -1] <= sum(objects)
    assert (counts[0] > 0).sum() >= 4


def test_pictures_have_captions_and_are_of_the_best_and_worst_images(parts):
    titles = [picture.title for picture in parts.pictures]
    curves = ["Precision and recall (box)"] * 2 + ["AP of classes (box)"]
    assert titles == [*curves, *(t.replace("box", "mask") for t in curves), *["Best images"] * 3, *["Worst images"] * 3]
    captions = [picture.caption for picture in parts.pictures]
    assert all("missed" in c or "wrong" in c or "badly" in c or "duplicate" in c for c in captions[-3:])
    assert all("correct" in caption for caption in captions[-6:-3])
    for picture in parts.pictures:
        assert Image.open(io.BytesIO(picture.png)).width > 300


def test_boxes_alone_and_one_class():
    images, annotations, records = synthetic(num_images=3)
    last, _ = evaluated(images, annotations, records, (120, 160), with_masks=False)
    parts = detection_report(last, NAMES, PALETTE)
    assert parts.tables[0].columns == ["class", "objects", "AP %", "AP50 %", "AP75 %", "AR %"]
    assert not [picture for picture in parts.pictures if "mask" in picture.title]
    one = {"precision": last["bbox"]["precision"][:, :, :1], "recall": last["bbox"]["recall"][:, :1]}
    one = {"bbox": one, "errors": last["errors"][:1], "best": [], "worst": []}
    assert len(detection_report(one, NAMES[:1], PALETTE[:1]).pictures) == 1


def test_nothing_to_evaluate_gives_empty_tables_and_no_warning(recwarn):
    nothing = {"precision": -np.ones((10, 101, 4, 4, 3)), "recall": -np.ones((10, 4, 4, 3))}
    last = {"bbox": nothing, "errors": np.zeros((4, 8), int), "best": [], "worst": []}
    parts = detection_report(last, NAMES, PALETTE)
    assert parts.tables[1].rows[0][1:] == [None, None]
    assert [str(w.message) for w in recwarn] == []


def test_many_classes_show_their_extremes():
    generator = np.random.default_rng(0)
    last = {
        "bbox": {"precision": generator.random((10, 101, 50, 4, 3)), "recall": generator.random((10, 50, 4, 3))},
        "errors": np.zeros((50, 8), int), "best": [], "worst": [],
    }  # fmt: skip
    parts = detection_report(last, [f"class {i}" for i in range(50)], [(0, 0, 0)] * 50)
    assert parts.pictures[1].caption == "The 10 classes of highest and of lowest AP"
    assert len(parts.tables[0].rows) == 50


# -- cases ------------------------------------------------------------------------------------------------------------


def test_a_case_is_small_and_its_objects_follow():
    size = (1000, 2000)
    box, small = [0, 0, 1000, 500], [100, 100, 200, 200]
    truth = Truth(
        np.array([box, small], float),
        np.array([CAT, DOG]),
        np.zeros(2, bool),
        [box_mask(b, size) for b in (box, small)],
    )
    record = make_record([box], [CAT], [0.9], [box_mask(box, size)])
    case = small_copies(
        torch.full((3, 400, 800), 77, dtype=torch.uint8), size, record, truth, match_image(record, truth)
    )
    assert case.image.shape == (240, 480, 3)
    assert (case.image == 77).all()
    assert case.truth.boxes.tolist() == [[0, 0, 240, 120], [24, 24, 48, 48]]
    assert case.truth.wrong.tolist() == [False, True]
    assert case.predicted.wrong.tolist() == [False]
    assert case.truth.masks[30, 30] == 1  # the smaller object lies on top
    assert case.truth.masks[100, 200] == 0
    assert case.truth.masks[200, 400] == -1
    assert (case.predicted.masks[:120, :240] == 0).all()
    assert case.counts == {KINDS.index("correct"): 1, KINDS.index("missed"): 1, OBJECTS: 2}


def test_a_case_keeps_a_bounded_number_of_objects():
    boxes = np.tile([0.0, 0, 50, 50], (500, 1))
    truth = make_truth(boxes, [CAT] * 500)
    record = make_record(boxes, [CAT] * 500, [0.9] * 500)
    case = small_copies(torch.zeros(3, 64, 64), (64, 64), record, truth, match_image(record, truth))
    assert len(case.truth.boxes) == len(case.predicted.boxes) == MAX_OBJECTS
    assert case.counts == {KINDS.index("correct"): 500, OBJECTS: 500}


def test_an_image_without_anything_can_be_kept():
    truth, record = make_truth([], []), make_record([], [], [], [])
    case = small_copies(torch.zeros(3, 64, 64), (64, 64), record, truth, match_image(record, truth))
    assert case.predicted.masks is not None
    assert (case.predicted.masks == -1).all()
