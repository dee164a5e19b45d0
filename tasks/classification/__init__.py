"""Image classification with any backbone of timm and our own: LIT, LITv2, HVT."""
