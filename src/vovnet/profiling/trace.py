"""Follows a forward pass operator by operator: the layers it runs and the buffers it keeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vovnet.profiling.cost import LayerCost, layer_cost
from vovnet.profiling.liveness import Peak, Step, peak_live

IsWeight = Callable[[Tensor], bool]


class Recorder(TorchDispatchMode):
    """Lists layers and buffers of a forward pass; a mode to enter, with `follow` around it.

    Every operator is seen below autograd, so functional calls count like modules. Views share the
    buffer of what they show; weights and constants are no buffers.
    """

    def __init__(self, module: nn.Module, inputs: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path = [""]
        self.layers: list[LayerCost] = []
        self.concat_memory_access = 0
        self._weights = {_storage_of(weight) for weight in module.parameters()}
        self._weights |= {_storage_of(buffer) for buffer in module.buffers()}
        self._steps: list[Step] = []
        self._sizes: dict[int, int] = {}  # elements of each buffer, by its storage
        self._read: set[int] = set()
        self._known: set[int] = set()  # storages met so far: of weights, constants and buffers
        # A storage that is gone could lend its address to a new one: a weak reference prevents it.
        self._references: list[StorageWeakRef] = []
        self._inputs = self._add_buffers(tensors_of(inputs))

    @contextmanager
    def follow(self, module: nn.Module) -> Iterator[None]:
        """Keep `path` at the module at work; at an error it stays where the error rose."""
        handles = []
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(part.register_forward_hook(partial(self._leave, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def peak(self, outputs: object) -> Peak:
        """The most elements alive at once; `outputs` of the pass live to its end."""
        kept = {_storage_of(tensor) for tensor in tensors_of(outputs)} & self._sizes.keys()
        # What nobody reads takes no memory: the indices of a max-pool, the statistics of a norm.
        used = self._read | self._inputs | kept
        sizes = {storage: size if storage in used else 0 for storage, size in self._sizes.items()}
        return peak_live(self._steps, sizes, inputs=self._inputs, outputs=kept)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        self._record_buffers(tensors_of((args, kwargs)), tensors_of(out))
        operator = str(func.overloadpacket)
        if operator in _RULES:
            self.layers.append(_RULES[operator](self.path[-1], args, out, self._is_weight))
        elif operator == "aten.cat":
            self.concat_memory_access += out.numel() + sum(part.numel() for part in args[0])
        return out

    def _record_buffers(self, read: list[Tensor], written: list[Tensor]) -> None:
        for tensor in read:
            self._meet(tensor)  # a tensor from nowhere is a constant
            self._read.add(_storage_of(tensor))
        self._add_buffers(written)
        used = dict.fromkeys(_storage_of(tensor) for tensor in [*read, *written])
        buffers = tuple(storage for storage in used if storage in self._sizes)
        if buffers:
            self._steps.append(Step(self.path[-1], buffers))

    def _add_buffers(self, tensors: list[Tensor]) -> set[int]:
        for tensor in tensors:
            if self._meet(tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.itemsize
                self._sizes[_storage_of(tensor)] = elements
        return {_storage_of(tensor) for tensor in tensors} & self._sizes.keys()

    def _meet(self, tensor: Tensor) -> bool:
        """Whether the storage of this tensor is a new one; from now on it is not."""
        storage = _storage_of(tensor)
        if storage in self._known:
            return False
        self._known.add(storage)
        self._references.append(StorageWeakRef(tensor.untyped_storage()))
        return True

    def _is_weight(self, tensor: Tensor) -> bool:
        return _storage_of(tensor) in self._weights

    def _enter(self, name: str, *_: object) -> None:
        self.path.append(name)

    def _leave(self, name: str, *_: object) -> None:
        while self.path.pop() != name:  # parts left by an error that the network caught itself
            pass


def tensors_of(tree: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _convolution(name: str, args: Any, out: Tensor, is_weight: IsWeight) -> LayerCost:
    x, weight, bias, stride, _padding, _dilation, transposed, _output_padding, groups = args
    spread = x if transposed else out  # the map whose every position meets every weight once
    return layer_cost(
        name,
        "conv_transpose" if transposed else "conv",
        [x.shape],
        output=out.shape,
        macs=spread.numel() // spread.shape[1] * weight.numel(),
        weight=weight.shape,
        bias_elements=0 if bias is None else bias.numel(),
        kernel=weight.shape[2:],
        stride=stride,
        groups=groups,
    )


def _deformable(name: str, args: Any, out: Tensor, is_weight: IsWeight) -> LayerCost:
    x, weight, offset, mask, bias, stride_y, stride_x = args[:7]
    groups, _offset_groups, use_mask = args[-3:]
    return layer_cost(
        name,
        "deform_conv",
        [x.shape, offset.shape, *([mask.shape] if use_mask else [])],
        output=out.shape,
        macs=out.numel() // out.shape[1] * weight.numel(),
        weight=weight.shape,
        bias_elements=bias.numel() if is_weight(bias) else 0,  # zeros where there is none
        kernel=weight.shape[2:],
        stride=(stride_y, stride_x),
        groups=groups,
    )


def _attention(name: str, args: Any, out: Any, is_weight: IsWeight) -> LayerCost:
    query, key, value = args[:3]
    return layer_cost(
        name,
        "attention",
        [query.shape, key.shape, value.shape],
        output=out[0].shape,
        macs=(query.numel() + out[0].numel()) * key.shape[-2],  # of both products
    )


def _product(
    name: str, args: Any, out: Tensor, is_weight: IsWeight, *, first: int = 0
) -> LayerCost:
    """A product of two matrices: a linear layer where one of them is a weight."""
    left, right = args[first : first + 2]
    bias_elements = args[0].numel() if first and is_weight(args[0]) else 0
    macs = left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
    for weight, other in ((right, left), (left, right)):
        if is_weight(weight):
            return layer_cost(
                name,
                "linear",
                [other.shape],
                output=out.shape,
                macs=macs,
                weight=weight.shape,
                bias_elements=bias_elements,
            )
    return layer_cost(name, "matmul", [left.shape, right.shape], output=out.shape, macs=macs)


_RULES: dict[str, Callable[[str, Any, Any, IsWeight], LayerCost]] = {
    "aten.convolution": _convolution,
    "torchvision.deform_conv2d": _deformable,
    "aten.mm": _product,
    "aten.bmm": _product,
    "aten.mv": _product,
    "aten.addmm": partial(_product, first=1),
    "aten.baddbmm": partial(_product, first=1),
    "aten.addmv": partial(_product, first=1),
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
}
