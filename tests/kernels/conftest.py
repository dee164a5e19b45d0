"""What the kernel tests share: `from comparison import ...` works, and a kernel can be asked for."""

import sys
from pathlib import Path

import pytest

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def kernels_required(monkeypatch):
    """Operations take their Triton kernels, on the GPU or in Triton's interpreter (see tests/conftest.py), or fail."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
