"""How a tensor lies in memory: the local shard as real numbers, flat where it can be, in blocks, shared with none."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy
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


def is_lazy(tensor: Tensor) -> bool:
    """Whether the bits in memory are not the elements' values: of a conjugate or negative view, or efficient zeros."""
    return tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()


def steps(tensor: Tensor) -> list[int]:
    """The strides that matter: a dimension of one element has none."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def are_flat(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors, of one shape, are dense with equal strides, so that each is one flat range in one order."""
    first = tensors[0]
    return is_dense(first) and all(tensor is first or steps(tensor) == steps(first) for tensor in tensors)


def is_flat(param: Tensor, buffers: Sequence[Tensor]) -> bool:
    """Whether equal offsets into the memory of a parameter and its buffers are equal elements, and the bits there their
    values: what a kernel over addresses needs."""
    tensors = [local(param), *map(local, buffers)]
    return are_flat(tensors) and not any(map(is_lazy, tensors)) and all(map(_has_memory, tensors))


def _has_memory(tensor: Tensor) -> bool:
    """False where the memory was freed. Tensors that never have any are for the back ends to refuse."""
    return tensor.is_meta or not owns_memory(tensor) or tensor.numel() == 0 or tensor.data_ptr() != 0


def version(tensor: Tensor) -> int:
    """The version counter. A DTensor and its shard have one each, and a write may move either."""
    if tensor.is_inference():
        return 0
    return tensor._version + (local(tensor)._version if isinstance(tensor, DTensor) else 0)


def versions_of(slots: Mapping[str, Sequence[Tensor]]) -> numpy.ndarray:
    """int64 `[n, 2]`: the version counters of the first slot's tensors, and the sums of those of the others."""
    params, *others = (list(map(version, slot)) for slot in slots.values())
    return numpy.array([params, list(map(sum, zip(*others, strict=True)))], numpy.int64).T


def matches(param: Tensor, grad: Tensor | None) -> bool:
    """Whether there is a gradient of the parameter's dtype, device and local shape."""
    return (
        grad is not None
        and grad.dtype == param.dtype
        and grad.device == param.device
        and grad.layout == torch.strided
        and local(grad).shape == local(param).shape
    )


class _Elements:
    """Where a tensor's elements lie, for numpy to compare addresses; nobody reads there, so any device will do."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"|V{size}",
        }


def shared_memory(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors with an element in common, or twice that of one with two elements in one place.

    Views that lie between each other (columns of a matrix) have nothing in common, nor have tensors without memory.
    """
    extents = []
    for index, tensor in enumerate(map(local, tensors)):
        if owns_memory(tensor) and tensor.layout == torch.strided and tensor.numel() and tensor.data_ptr():
            if not is_dense(tensor) and _overlaps_itself(tensor):
                return index, index
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
            extents.append((tensor.device.type, tensor.get_device(), start, end, index))

    @functools.cache
    def elements(index: int) -> numpy.ndarray:
        return numpy.asarray(_Elements(local(tensors[index])))

    begun: list[tuple[str, int, int, int, int]] = []
    for extent in sorted(extents):
        begun = [other for other in begun if other[:2] == extent[:2] and other[3] > extent[2]]
        for index in (other[4] for other in begun):
            if numpy.shares_memory(elements(index), elements(extent[4])):
                return min(index, extent[4]), max(index, extent[4])
        begun.append(extent)
    return None


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride <= reach:
                break
            reach += (size - 1) * stride
    else:
        return False  # each dimension steps over all that the smaller ones reach
    offsets = numpy.zeros(1, dtype=numpy.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = numpy.unique(offsets[:, None] + stride * numpy.arange(size))
    return len(offsets) < tensor.numel()


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
