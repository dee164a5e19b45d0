"""``python -m tasks.segmentation {fit,validate,test,predict,check} -c configs/<name>.yaml``."""

import tasks.segmentation.mmseg_module  # noqa: F401  (its classes can be named)
from tasks.core.cli import main
from tasks.segmentation.data import SegmentationDataModule
from tasks.segmentation.module import SegmentationModule

if __name__ == "__main__":
    main(SegmentationModule, SegmentationDataModule)
