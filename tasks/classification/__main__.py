"""``python -m tasks.classification {fit,validate,test,predict,check} -c configs/<name>.yaml``."""

from tasks.classification.data import ClassificationDataModule
from tasks.classification.module import Classification
from tasks.core.cli import main

if __name__ == "__main__":
    main(Classification, ClassificationDataModule)
