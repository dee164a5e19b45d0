"""What people run: one package per task, shared parts in `tasks.core`."""

import os

# albumentations asks a package index for its newest version when it is imported; a training node may have no network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
