"""Plain power iteration by exact double differentiation in PyTorch, the peer of bitfall's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from start_vector import start_vector

# Parameters of a layer in the order of bitfall's flat buffer (engine/encoder_layer.cpp).
LAYER_PARAMETERS = [
    *(f"attention.self.{part}.weight" for part in ("query", "key", "value")),
    *(f"attention.self.{part}.bias" for part in ("query", "key", "value")),
    *(f"attention.output.dense.{kind}" for kind in ("weight", "bias")),
    *(f"attention.output.LayerNorm.{kind}" for kind in ("weight", "bias")),
    *(f"intermediate.dense.{kind}" for kind in ("weight", "bias")),
    *(f"output.dense.{kind}" for kind in ("weight", "bias")),
    *(f"output.LayerNorm.{kind}" for kind in ("weight", "bias")),
]

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class PowerIteration:
    value: float
    iterations: int


def layer_parameters(model: torch.nn.Module, layer: int) -> list[torch.nn.Parameter]:
    """The parameters of encoder layer `layer`, in bitfall's order."""
    return [model.get_parameter(f"bert.encoder.layer.{layer}.{name}") for name in LAYER_PARAMETERS]


def hessian_product(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> Product:
    """v [n] -> H v [n] by a second backward pass through the gradients of `loss`."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    sizes = [parameter.numel() for parameter in parameters]

    def product(v: torch.Tensor) -> torch.Tensor:
        parts = [p.view_as(g) for p, g in zip(v.split(sizes), gradients, strict=True)]
        columns = torch.autograd.grad(gradients, parameters, grad_outputs=parts, retain_graph=True)
        return torch.cat([column.reshape(-1) for column in columns]).detach()

    return product


def power_iteration(
    product: Product, start: torch.Tensor, max_iter: int, tol: float, stability: float
) -> PowerIteration:
    """One product per iteration, as DeepSpeed's eigenvalue.py without its loss-scale error."""
    v = start / (start.norm() + stability)
    value, previous, iterations = 1.0, 0.0, 0
    while iterations < max_iter and value != 0 and abs((value - previous) / value) >= tol:
        previous = value
        column = product(v)
        value = torch.dot(column, v).item()
        v = column / (column.norm() + stability)
        iterations += 1
    return PowerIteration(value, iterations)


def layer_eigenvalue(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    layer: int,
    seed: int,
    step: int,
    max_iter: int = 100,
    tol: float = 1e-2,
    stability: float = 1e-6,
) -> PowerIteration:
    """Power iteration on one layer from bitfall's start vector for (seed, step, layer)."""
    parameters = layer_parameters(model, layer)
    numel = sum(parameter.numel() for parameter in parameters)
    start = torch.from_numpy(start_vector(seed, step, layer, numel)).to(parameters[0].dtype)
    return power_iteration(hessian_product(loss(), parameters), start, max_iter, tol, stability)
