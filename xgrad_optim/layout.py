"""How a tensor lies in memory: the local shard as real numbers, flat where it can be, in cache-sized blocks."""

from collections.abc import Iterator

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor
else:  # builds of torch without distributed
    DTensor = ()  # type: ignore[assignment,misc]


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or a DTensor's local shard."""
    # to_local() of a parameter is another tensor at every call, over the same memory.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_placed_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether both are plain tensors, or both DTensors that are cut alike, so that their shards belong together."""
    if isinstance(tensor, DTensor) and isinstance(param, DTensor):
        return tensor.placements == param.placements and tensor.device_mesh == param.device_mesh
    return isinstance(tensor, DTensor) == isinstance(param, DTensor)


def place_like(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor, cut as the parameter is: pending sums are carried out, and of a whole tensor the shard is taken."""
    if is_placed_like(tensor, param) or not isinstance(param, DTensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=param.placements)
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def as_real(tensor: Tensor) -> Tensor:
    """The tensor, or a complex tensor's pairs of reals: its own memory, unless it is a lazy conjugate."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def plain(tensor: Tensor) -> Tensor:
    """The tensor's own memory as the kernels see it."""
    return as_real(local(tensor))


PLAIN_CLASSES = {Tensor, torch.nn.Parameter}
"""Classes whose instances are the memory at their address."""


def owns_memory(tensor: Tensor) -> bool:
    """Whether there is memory at its address: fake tensors, for one, have none."""
    cls = type(tensor)
    return cls in PLAIN_CLASSES or cls.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def are_flat(tensors: list[Tensor]) -> bool:
    """Whether the tensors, of one shape, are dense with equal strides, so that each is one flat range in one order."""
    strides = tensors[0].stride()
    return is_dense(tensors[0]) and all(tensor.stride() == strides for tensor in tensors[1:])


def blocks(tensors: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Views as reals that together cover the tensors, which have one shape, at most `size` elements at a time."""
    views = list(tensors.values())
    if views[0].dim() != 1 and are_flat(views):
        views = [view.as_strided((view.numel(),), (1,)) for view in views]
    for parts in _split(views, size):
        yield dict(zip(tensors, map(as_real, parts), strict=True))


def _split(views: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    numel = views[0].numel()
    if numel <= size:
        if numel:
            yield views
        return
    shape = views[0].shape
    longest = max(range(len(shape)), key=shape.__getitem__)
    length = max(1, shape[longest] * size // numel)
    for parts in zip(*(view.split(length, longest) for view in views), strict=True):
        yield from _split(list(parts), size)
