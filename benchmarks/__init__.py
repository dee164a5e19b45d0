"""Measurements beside peers: ``python -m benchmarks {backbones,kernels}``. Needs torch, torchvision and timm only."""
