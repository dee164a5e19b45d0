"""What the modules of this task have in common: a name for the command line, and what it takes from the data."""

from collections.abc import Mapping
from typing import ClassVar

from tasks.core.module import TaskModule


class VideoModule(TaskModule):
    """Base of detection and classification in videos.

    The command line leaves out those options of `from_data` that a module does not have.
    """

    task = "video"
    from_data: ClassVar[Mapping[str, str]] = {
        **TaskModule.from_data,
        "crop_size": "image_size",
        "feature_dim": "feature_dim",
        "frames_per_feature": "frames_per_feature",
    }
