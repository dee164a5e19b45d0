"""Object detection and instance segmentation: RetinaNet, Mask R-CNN, DINO and other detectors."""
