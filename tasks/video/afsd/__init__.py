"""AFSD (CVPR 2021, arXiv 2103.13137): networks, losses and decoding of its predictions."""
