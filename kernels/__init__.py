"""Operations: a PyTorch reference and Triton kernels each."""
