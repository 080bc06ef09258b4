"""Param groups as training scripts write them."""

from typing import Any

from torch.nn import Module


def decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups with weight decay for matrices, and none for vectors, biases, norms and scales.

    For any optimizer: ``XAdamW(decay_groups(model, 0.1), lr=1e-3)``. The parameters come with their names, as from
    ``model.named_parameters()``, a tied one once; options may be added to either group. Embeddings are matrices.

    Args:
        model: whose parameters they are, frozen ones included.
        weight_decay (float): of the parameters with two dimensions or more that are no biases, nor of a module whose
            class is called a norm.

    Returns:
        The group with weight decay, and the one without; only one of them where the other would be empty.
    """
    norms = {
        param
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for param in module.parameters(recurse=False)
    }
    parts: tuple[list[Any], list[Any]] = [], []
    for name, param in model.named_parameters():
        is_free = param.dim() < 2 or param in norms or name.rpartition(".")[2] == "bias"
        parts[is_free].append((name, param))
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (weight_decay, 0.0), strict=True)]
    return [group for group in groups if group["params"]]
