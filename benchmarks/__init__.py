"""Measurements beside peers: ``python -m benchmarks backbones``. Needs torch, torchvision and timm only."""
