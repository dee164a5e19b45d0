"""FASeg and Mask2Former: mask classification with focus-aware queries."""
