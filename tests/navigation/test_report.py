import cv2
import numpy as np
import pytest

from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.evaluators import R2REvaluator
from tasks.navigation.report import navigation_report


@pytest.fixture(scope="module")
def evaluated(house_data):
    """A report on agents of which one in three stops at once."""
    episodes = house_data.samples("val_unseen")[:30]
    environment: NavigationEnvironment = house_data.environment()
    seen = environment.reset(episodes)
    for t in range(8):
        actions = seen.teacher.numpy().copy()
        if t == 0:
            actions[::3] = -1
        seen = environment.step(actions)
    records = {}
    for row, episode in enumerate(episodes):
        options = [*environment.world.panorama(episode.scan).candidates(episode.start)]
        step = {
            "viewpoint": episode.start,
            "options": [candidate.viewpoint for candidate in options],
            "scores": [1 / (len(options) + 1)] * (len(options) + 1),
            "choice": len(options) if row % 3 == 0 else 0,
            "attended": [["sofa", 0.75]],
        }
        records[episode.key] = {"trajectory": environment.trajectory(row), "steps": [step]}
    evaluation = R2REvaluator(episodes, house_data.graphs).evaluate({e.id: records[e.key] for e in episodes})
    parts = navigation_report({"val_unseen": evaluation}, records, {e.key: e for e in episodes}, house_data.graphs)
    return episodes, evaluation, parts


def test_tables_by_outcome_length_and_scan(evaluated):
    episodes, evaluation, parts = evaluated
    outcomes, lengths, scans = parts.tables[:3]
    assert [row[1] for row in outcomes.rows] == [20, 0, 10]
    assert [row[0] for row in lengths.rows] == [f"{n} viewpoints" for n in sorted({len(e.path) for e in episodes})]
    assert sum(row[1] for row in lengths.rows) == 30
    ((scan, count, *figures),) = scans.rows
    assert (scan, count) == (episodes[0].scan, 30)
    assert dict(zip(scans.columns[2:], figures, strict=True))["SR %"] == pytest.approx(100 * evaluation.summary["SR"])


def test_maps_of_the_best_and_worst_episodes(evaluated):
    episodes, evaluation, parts = evaluated
    assert [picture.title for picture in parts.pictures] == ["Best episodes"] * 3 + ["Worst episodes"] * 3
    by_key = {episode.key: (row, episode) for row, episode in enumerate(episodes)}
    for picture in parts.pictures:
        row, episode = by_key[picture.caption.split(" ", 1)[0]]
        assert (evaluation.table["SR"][row] == 1) == (picture.title == "Best episodes")
        assert episode.instruction in picture.caption
        image = cv2.imdecode(np.frombuffer(picture.png, np.uint8), cv2.IMREAD_COLOR)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50  # something is drawn
    assert len({picture.png for picture in parts.pictures}) == 6


def test_steps_tell_choices_and_attended_objects(evaluated):
    _, _, parts = evaluated
    steps = [table for table in parts.tables if table.title.startswith("Steps of val_unseen/")]
    assert len(steps) == 6
    chosen = [table.rows[0][2] for table in steps]
    assert all(choice.startswith("go to ") for choice in chosen[:3])
    assert chosen[3:] == ["stop"] * 3
    assert {table.rows[0][5] for table in steps} == {"sofa 75 %"}
