"""``python -m tasks.detection {fit,validate,test,predict,check} -c configs/<name>.yaml``."""

from tasks.core.cli import main
from tasks.detection.data import DetectionDataModule
from tasks.detection.module import DetectionModule

if __name__ == "__main__":
    main(DetectionModule, DetectionDataModule)
