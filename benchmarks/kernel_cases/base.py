"""What a case of the kernel benchmark is: an operation at one shape, its inputs, its cost and who can compute it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor | tuple[Tensor, ...]]

OURS = "frugal"
REFERENCE, COMPILED = "reference", "reference, torch.compile"
FORWARD, BOTH = "forward", "forward+backward"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Candidate(NamedTuple):
    """One way to compute a case.

    `composed` marks a composition of PyTorch operations without a compiler. A candidate that is not `comparable`
    computes something else of the same shape, or nothing: a yardstick, whose numbers are not compared.
    """

    run: Function
    composed: bool = False
    comparable: bool = True
    on_cpu: bool = True


@dataclass(frozen=True)
class Draw:
    """Random inputs of a case, the same for every run."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        """A leaf of standard normal numbers."""
        return self._made(torch.randn(shape, generator=self.generator, device=self.device), grad)

    def uniform(self, *shape: int, grad: bool = True) -> Tensor:
        """A leaf of numbers in [0, 1)."""
        return self._made(torch.rand(shape, generator=self.generator, device=self.device), grad)

    def _made(self, numbers: Tensor, grad: bool) -> Tensor:
        return numbers.to(self.dtype).requires_grad_(grad)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """An operation at one shape of a real model; `batch` counts images or clips, `large` ones are left out on a CPU.

    The least a pass must move is every input and output once and, for the backward pass, once more with every
    gradient; `flops` are the multiplications and additions of its matrix products.
    """

    op: ClassVar[str]
    passes: ClassVar[tuple[str, ...]] = (FORWARD, BOTH)
    yardstick_inputs: ClassVar[tuple[str, ...]] = ()  # what only a yardstick reads
    backward_products: ClassVar[float] = 2.0  # matrix products of the backward pass for one of the forward pass
    name: str
    batch: int
    large: bool = False

    @abstractmethod
    def inputs(self, draw: Draw) -> Inputs:
        """Tensors by name, laid out as the projections of the model leave them; leaves that need a gradient get one."""

    @abstractmethod
    def reference(self, inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
        """The definition of correct."""

    @abstractmethod
    def candidates(self) -> dict[str, Candidate]:
        """Everyone who computes the case, by name; ours is first."""

    def forward_flops(self) -> float:
        """Operations of the matrix products in the forward pass."""
        return 0.0

    def flops(self, what: str) -> float:
        """Operations of the matrix products in the pass `what`."""
        return self.forward_flops() * (1 if what == FORWARD else 1 + self.backward_products)


def reference_and_compiled(reference: Function) -> dict[str, Candidate]:
    """The reference as PyTorch runs it, and compiled."""
    return {
        REFERENCE: Candidate(reference, composed=True),
        COMPILED: Candidate(compiled(reference), on_cpu=False),
    }


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` for the shapes it is called with."""
    return torch.compile(function, dynamic=False)


def with_backends(
    attend: Callable[[Inputs, Callable[..., Tensor]], Tensor | tuple[Tensor, ...]],
) -> dict[str, Candidate]:
    """`attend`, which gets the inputs and `scaled_dot_product_attention`, with each backend."""

    def run(backend: SDPBackend) -> Function:
        def call(inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return attend(inputs, F.scaled_dot_product_attention)

        return call

    return {
        f"SDPA {name}": Candidate(run(backend), composed=True, on_cpu=name in ("flash", "math"))
        for name, backend in BACKENDS.items()
    }


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
