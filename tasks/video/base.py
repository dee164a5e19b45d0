"""What the modules of this task have in common: a name for the command line to choose among them."""

from tasks.core.module import TaskModule


class VideoModule(TaskModule):
    """Base of detection and classification in videos."""

    task = "video"
