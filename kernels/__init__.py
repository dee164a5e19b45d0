"""Operations: a PyTorch reference each, with Triton kernels where they pay."""
