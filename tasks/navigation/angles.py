"""Directions as features: sine and cosine of heading and elevation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.core.errors import expect
from tasks.navigation.sightlines import NUM_HEADINGS, NUM_VIEWS, STEP, view_angles

FORWARD, BACKWARD, LEFT, RIGHT = range(4)


def angle_features(heading: ArrayLike, elevation: ArrayLike, size: int = 4) -> NDArray[np.float32]:
    """(..., size) float32: sin and cos of the heading, then of the elevation (radians), repeated up to `size`."""
    expect("angle feature size", size, size > 0 and size % 4 == 0, "a positive multiple of 4")
    heading, elevation = np.broadcast_arrays(np.asarray(heading, np.float64), np.asarray(elevation, np.float64))
    four = np.stack([np.sin(heading), np.cos(heading), np.sin(elevation), np.cos(elevation)], axis=-1)
    return np.tile(four.astype(np.float32), size // 4)


def view_heading(view: ArrayLike) -> NDArray[np.float64]:
    """Heading of the centre of a discrete view."""
    return np.asarray(view) % NUM_HEADINGS * STEP


def view_elevation(view: ArrayLike) -> NDArray[np.float64]:
    """Elevation of the centre of a discrete view."""
    return (np.asarray(view) // NUM_HEADINGS - 1) * STEP


def view_angle_features(relative_elevation: bool, size: int = 4) -> NDArray[np.float32]:
    """(36, 36, size): directions of the 36 views as seen from each of the 36 views.

    Headings are relative to the base view. Elevations are absolute as in EnvDrop and ORIST, or, with
    `relative_elevation`, minus that of the base view as in HAMT and DUET.
    """
    headings, elevations = view_angles()
    base = np.arange(NUM_VIEWS)[:, None]
    return angle_features(
        headings - view_heading(base), elevations - (view_elevation(base) if relative_elevation else 0), size
    )


def direction_class(heading: ArrayLike) -> NDArray[np.int64]:
    """Where a relative heading (radians) leads: 0 forward, 1 backward, 2 left, 3 right (ORIST's direction head)."""
    degrees = np.degrees(np.asarray(heading, dtype=np.float64)) % 360
    return np.select(
        [(degrees >= 45) & (degrees <= 135), (degrees > 135) & (degrees <= 225), (degrees > 225) & (degrees <= 315)],
        [RIGHT, BACKWARD, LEFT],
        FORWARD,
    )
