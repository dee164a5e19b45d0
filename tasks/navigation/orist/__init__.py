"""ORIST: Object-and-Room Informed Sequential BERT (ICCV 2021, arXiv 2104.04167)."""
