import torch

from tasks.segmentation.faseg.inference import (
    class_scores,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)


def queries(classes, boxes, num_classes=4, size=(8, 8), confidence=9.0):
    """Build one query per (class, (top, bottom, left, right)): sure of its class and of its box."""
    logits = torch.zeros(len(classes), num_classes + 1)
    masks = torch.full((len(classes), *size), -9.0)
    for query, (category, (top, bottom, left, right)) in enumerate(zip(classes, boxes, strict=True)):
        logits[query, category] = confidence
        masks[query, top:bottom, left:right] = 9.0
    return logits, masks


def test_class_scores_sum_queries_and_drop_no_object():
    logits, masks = queries([1, 1, 4], [(0, 8, 0, 8), (0, 8, 0, 4), (0, 8, 0, 8)])
    scores = class_scores(logits, masks)
    assert scores.shape == (4, 8, 8)
    assert scores[1, 0, 0] > 1.9  # two queries agree: not a probability
    assert 0.9 < scores[1, 0, 7] < 1.1
    batched = class_scores(logits.expand(2, -1, -1), masks.expand(2, -1, -1, -1))
    torch.testing.assert_close(batched[1], scores)


def test_semantic_inference_cuts_padding_before_resizing():
    logits, masks = queries([0, 2], [(0, 8, 0, 4), (0, 8, 4, 8)])  # of a 32x32 padded image
    scores = semantic_inference(logits, masks, image_size=(32, 16), output_size=(64, 32))
    assert scores.shape == (4, 64, 32)
    assert (scores.argmax(0)[:, :28] == 0).all()  # what class 2 covers was padding
    whole = semantic_inference(logits, masks, image_size=(32, 32), output_size=(16, 16))
    assert (whole.argmax(0)[:, 9:] == 2).all()


def test_panoptic_merges_stuff_and_counts_things():
    boxes = [(0, 4, 0, 4), (0, 4, 4, 8), (4, 8, 0, 4), (4, 8, 4, 8)]
    panoptic, segments = panoptic_inference(*queries([0, 0, 3, 3], boxes), thing_classes={0})
    assert [tuple(segment) for segment in segments] == [(1, True, 0), (2, True, 0), (3, False, 3)]
    assert panoptic[0, 0] == 1
    assert panoptic[0, 7] == 2
    assert (panoptic[4:] == 3).all()


def test_panoptic_drops_unsure_hidden_and_absent_queries():
    unsure = queries([0], [(0, 8, 0, 8)], confidence=1.0)
    panoptic, segments = panoptic_inference(*unsure, thing_classes={0})
    assert segments == []
    assert not panoptic.any()

    logits, masks = queries([0, 1], [(0, 8, 0, 8), (0, 8, 0, 6)], confidence=20.0)
    masks[1] *= 0.5  # loses every pixel of the overlap
    panoptic, segments = panoptic_inference(logits, masks, thing_classes={0, 1})
    assert [segment.category for segment in segments] == [0]

    no_object = queries([4], [(0, 8, 0, 8)])
    assert panoptic_inference(*no_object, thing_classes={0})[1] == []


def test_instances_are_ranked_and_filtered():
    logits, masks = queries([0, 3], [(0, 4, 0, 4), (4, 8, 4, 8)])
    logits[1, 3] = 5.0
    instances = instance_inference(logits, masks, top_k=2)
    assert instances.classes.tolist() == [0, 3]
    assert instances.scores[0] > instances.scores[1] > 0.9
    assert instances.masks[0, :4, :4].all()
    assert instances.masks[0].sum() == 16
    things = instance_inference(logits, masks, top_k=2, thing_classes={3})
    assert things.classes.tolist() == [3]
    assert len(instance_inference(logits, masks, top_k=100).scores) == 8
