"""Linear layers by this machine's faster matrix multiplication on CPU, found by a short measurement.

`F.linear` multiplies float32 by the BLAS that torch was built with. On some CPUs torch's other library, oneDNN, is more
than twice as fast; on others it gains nothing. Half precision has the opposite trap: without instructions for it,
bfloat16 matrices multiply several times faster by way of float32. Neither can be told from the name of a CPU, so the
first large product of a process measures the ways at hand (about 50 ms) and keeps the winners for the whole process,
separately for the three products of a layer:

    forward      y  = x  W^T + b   [m, i] x [o, i]
    grad_input   dx = dy W         [m, o] x [o, i]
    grad_weight  dW = dy^T x       [m, o] x [m, i]

Wherever nothing is clearly faster the result is that of `F.linear`, bit for bit: small products, other devices, double
precision, autocast, `torch.compile`, `torch.export`, `torch.func` and deterministic mode always take it.
`EHRSEQ_LINEAR` overrides the measurement: `default` (always `F.linear`), `onednn` (oneDNN for float32, whatever the
speed), `auto`.

Glossary: m rows (tokens of all sequences), i inputs, o outputs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODES = ("auto", "default", "onednn")
OPERATIONS = ("forward", "grad_input", "grad_weight")

# A smaller weight is never worth the question; no measurement is made for it either.
MIN_WEIGHT = 2**16
# The measured layer (square) and its rows: the most rows decide who wins, the others from how many on.
MEASURED_WIDTH = 384
MEASURED_ROWS = {torch.float32: (512, 64, 8), torch.bfloat16: (64, 8), torch.float16: (64, 8)}
WINS_BY = 1.25  # clearly faster: noise must not decide, or two runs would differ
SECONDS_EACH = 0.008  # of measuring, for each product and number of rows
# Largest accepted error, relative to the largest value: what a wrong kernel exceeds and another order of sums does not.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

Product = Callable[[Tensor, Tensor], Tensor]

# Inside torch.func's transforms a tensor hides its batch dimension; there F.linear knows what to do.
_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


# ---------------------------------------------------------------------------------------------------------------------
# The ways to multiply: each gives the three products of matrices (bias is added by the caller)
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Way:
    """One way to compute the three products (see the module's text for the shapes)."""

    forward: Product
    grad_input: Product
    grad_weight: Product


def _pointwise(a: Tensor, b: Tensor) -> Tensor:
    """A b^T by oneDNN's inner product, which torch keeps for its compiler."""
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.contiguous(), None, "none", [], "")


def _convolution(a: Tensor, b: Tensor) -> Tensor:
    """A b^T by oneDNN as a 1 x 1 convolution of an image [1, c, m, 1] in channels-last order: the same memory."""
    (m, c), o = a.shape, b.shape[0]
    image = a.contiguous().as_strided((1, c, m, 1), (m * c, 1, c, c))
    taps = b.contiguous().as_strided((o, c, 1, 1), (c, 1, c, c))
    out = torch.mkldnn_convolution(image, taps, None, [0, 0], [1, 1], [1, 1], 1)
    return out[0, :, :, 0].t().contiguous()  # [m, o], without a copy


def _by_inner_product(inner: Product) -> Way:
    """The three products from one function (a [m, k], b [n, k]) -> a b^T [m, n]."""
    return Way(
        forward=inner,
        grad_input=lambda grad, weight: inner(grad, weight.t()),
        grad_weight=lambda grad, x: inner(grad.t(), x.t()),
    )


def _by_float32(product: Product) -> Product:
    return lambda a, b: product(a.float(), b.float()).to(a.dtype)


WAYS: dict[str, Way] = {
    "default": Way(
        forward=F.linear,
        grad_input=torch.mm,
        grad_weight=lambda grad, x: grad.t() @ x,
    ),
    "onednn": _by_inner_product(_pointwise),
    "onednn_conv": _by_inner_product(_convolution),
}
WAYS["float32"] = Way(*(_by_float32(getattr(WAYS["default"], operation)) for operation in OPERATIONS))

CANDIDATES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("onednn", "onednn_conv"),
    torch.bfloat16: ("float32",),
    torch.float16: ("float32",),
}


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ProductChoice:
    """How one of the three products is computed.

    Attributes:
        way: "default", "onednn", "onednn_conv" or "float32" (half precision by way of float32).
        min_rows: Rows from which on it is; below, the default.
        gflops: Measured speed of every way at the most rows, 1e9 operations a second of one core.
    """

    way: str = "default"
    min_rows: int = 0
    gflops: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearChoice:
    """How linear layers of one dtype are computed on this machine's CPU, for the life of the process.

    Attributes:
        dtype: The dtype.
        mode: Value of `EHRSEQ_LINEAR` that led to it.
        products: Choice by product ("forward", "grad_input", "grad_weight").
        unavailable: Ways that cannot be used here, and why.
    """

    dtype: torch.dtype
    mode: str
    products: dict[str, ProductChoice]
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def is_default(self) -> bool:
        """Whether all three products are those of `F.linear`."""
        return all(choice.way == "default" for choice in self.products.values())

    def __str__(self) -> str:
        parts = []
        for operation, choice in self.products.items():
            speeds = ", ".join(f"{name} {value:.0f}" for name, value in choice.gflops.items())
            rows = f" from {choice.min_rows} rows on" if choice.min_rows > 1 else ""
            parts.append(f"{operation}: {choice.way}{rows}" + (f" (GFLOP/s a core: {speeds})" if speeds else ""))
        dtype = str(self.dtype).removeprefix("torch.")
        notes = [f"{name} unavailable: {reason}" for name, reason in self.unavailable.items()]
        return f"linear layers on CPU, {dtype}, EHRSEQ_LINEAR={self.mode}: " + "; ".join(parts + notes)


_as_measured: ContextVar[bool] = ContextVar("products as measured", default=True)


@contextmanager
def plain_products() -> Iterator[None]:
    """Every product inside is that of `F.linear`: the same bits in every process, whatever was measured in it."""
    before = _as_measured.set(False)
    try:
        yield
    finally:
        _as_measured.reset(before)


_choices: dict[torch.dtype, LinearChoice] = {}
_lock = threading.Lock()


def linear_choice(dtype: torch.dtype = torch.float32) -> LinearChoice:
    """The choice of this process for one dtype; the first call measures, later ones answer the same.

    Args:
        dtype: float32, bfloat16 or float16; every other dtype is computed by `F.linear`.

    Returns:
        The choice; `str()` of it is one line for a log.

    Raises:
        ValueError: `EHRSEQ_LINEAR` is none of `auto`, `default`, `onednn`, or asks for oneDNN where there is none.
    """
    choice = _choices.get(dtype)
    if choice is not None:
        return choice
    with _lock:
        if dtype not in _choices:
            choice = _choose(dtype)
            logger.info(str(choice))
            _choices[dtype] = choice
        return _choices[dtype]


def _choose(dtype: torch.dtype) -> LinearChoice:
    mode = os.environ.get("EHRSEQ_LINEAR", "").strip().lower() or "auto"
    if mode not in MODES:
        raise ValueError(f"The environment variable EHRSEQ_LINEAR is {mode!r}, expected one of {list(MODES)}.")
    default = {operation: ProductChoice() for operation in OPERATIONS}
    # The default product of half precision is oneDNN's already.
    if mode == "default" or dtype not in CANDIDATES or (mode == "onednn" and dtype != torch.float32):
        return LinearChoice(dtype, mode, default)
    # Nothing around the first product may leak in, and nothing of the measurement may leak out. One thread and its own
    # CPU time: the wall time of several tells more of what else runs on the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            reasons = {name: _why_not(name, dtype) for name in CANDIDATES[dtype]}
            usable = [name for name, reason in reasons.items() if reason is None]
            unavailable = {name: reason for name, reason in reasons.items() if reason is not None}
            if mode == "onednn" and not usable:
                raise ValueError(f"EHRSEQ_LINEAR=onednn, but oneDNN cannot be used here: {unavailable}. Use 'auto'.")
            if mode == "onednn":
                products = {operation: ProductChoice(usable[0]) for operation in OPERATIONS}
            else:
                products = {operation: _measure(operation, usable, dtype) for operation in OPERATIONS}
    finally:
        torch.set_num_threads(threads)
    return LinearChoice(dtype, mode, products, unavailable)


def _operands(operation: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two matrices of one product; made without touching the global random state."""
    generator = torch.Generator().manual_seed(rows)
    second = rows if operation == "grad_weight" else MEASURED_WIDTH
    a, b = (torch.randn(m, MEASURED_WIDTH, generator=generator, dtype=torch.float32) for m in (rows, second))
    return a.to(dtype), b.to(dtype)


def _why_not(name: str, dtype: torch.dtype) -> str | None:
    """Why a way cannot be used on this machine, None when it gives right results."""
    if name.startswith("onednn") and not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch has no oneDNN, or it is switched off"
    for operation in OPERATIONS:
        a, b = _operands(operation, 16, dtype)
        expected = getattr(WAYS["default"], operation)(a.double(), b.double())
        try:
            actual = getattr(WAYS[name], operation)(a, b)
        except (RuntimeError, AttributeError, TypeError) as error:
            return f"{operation} fails: {str(error).splitlines()[0]}"
        error_size = (actual.double() - expected).abs().max() / expected.abs().max()
        if not error_size <= TOLERANCES[dtype]:
            return f"{operation} is wrong by {error_size:.1e}"
    return None


def _measure(operation: str, names: list[str], dtype: torch.dtype) -> ProductChoice:
    """The fastest way of one product, and from how many rows on it is."""
    if not names:
        return ProductChoice()
    most, *fewer = MEASURED_ROWS[dtype]
    seconds = _seconds(operation, most, ["default", *names], dtype)
    work = 2e-9 * most * MEASURED_WIDTH**2
    gflops = {name: work / shortest for name, shortest in seconds.items()}
    best = min(names, key=seconds.__getitem__)
    if seconds["default"] < WINS_BY * seconds[best]:
        return ProductChoice(gflops=gflops)
    min_rows = most
    for rows in fewer:
        seconds = _seconds(operation, rows, ["default", best], dtype)
        if seconds["default"] < WINS_BY * seconds[best]:
            break
        min_rows = rows
    return ProductChoice(best, min_rows, gflops)


def _seconds(operation: str, rows: int, names: list[str], dtype: torch.dtype) -> dict[str, float]:
    """Shortest CPU time of each way, measured in turns: other load on the machine then hits all of them alike."""
    a, b = _operands(operation, rows, dtype)
    products: dict[str, Product] = {name: getattr(WAYS[name], operation) for name in names}
    shortest = dict.fromkeys(names, float("inf"))
    end = time.thread_time() + SECONDS_EACH
    for turn in range(50):
        for name, product in products.items():
            start = time.thread_time()
            product(a, b)
            if turn:  # the first is for warming up
                shortest[name] = min(shortest[name], max(time.thread_time() - start, 1e-9))
        if turn >= 2 and time.thread_time() > end:
            break
    return shortest


# ---------------------------------------------------------------------------------------------------------------------
# The product
# ---------------------------------------------------------------------------------------------------------------------
def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, by the fastest way that this machine was measured to have.

    Args:
        x: [..., i].
        weight: [o, i].
        bias: [o].

    Returns:
        [..., o] in the dtype of `x`; exactly `F.linear`'s values wherever that is used (see the module's text).
    """
    if not _may_choose(x, weight, bias):
        return F.linear(x, weight, bias)
    choice = linear_choice(x.dtype)
    if choice.is_default:
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if all(rows < product.min_rows or product.way == "default" for product in choice.products.values()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _FastLinear.apply(x, weight, bias)
    return _forward(x, weight, bias)


def are_plain_tensors(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary CPU tensors in eager mode, with no transform, trace or dispatch in between."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transforming():
        return False
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided)
        for t in tensors
    )


def _may_choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether anything but `F.linear` comes into question: plain, large enough CPU tensors of one dtype."""
    if not are_plain_tensors(x, weight, bias):
        return False
    if weight.dim() != 2 or weight.numel() < MIN_WEIGHT or x.dim() == 0 or x.numel() == 0:
        return False
    if x.dtype not in CANDIDATES or weight.dtype != x.dtype or x.shape[-1] != weight.shape[1]:
        return False  # F.linear says what does not fit
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    if _as_measured.get() is False:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.are_deterministic_algorithms_enabled()


def _way(operation: str, rows: Tensor) -> str:
    """Name of the chosen way for a product of this many rows."""
    choice = linear_choice(rows.dtype).products[operation]
    return choice.way if rows.shape[0] >= choice.min_rows else "default"


def _product(operation: str, a: Tensor, b: Tensor, differentiable: bool = False) -> Tensor:
    """One of the three products of matrices, by the chosen way."""
    return getattr(WAYS["default" if differentiable else _way(operation, a)], operation)(a, b)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    way = _way("forward", rows)
    if way == "default":
        return F.linear(x, weight, bias)
    out = WAYS[way].forward(rows, weight)
    if bias is not None:
        out = out.add_(bias)
    return out.view(*x.shape[:-1], weight.shape[0])


class _FastLinear(torch.autograd.Function):
    """Saves what `F.linear` saves. A second derivative goes through the default products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        differentiable = torch.is_grad_enabled()  # create_graph=True
        return (
            _product("grad_input", grad_rows, weight, differentiable).view(x.shape) if needs_x else None,
            _product("grad_weight", grad_rows, rows, differentiable) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
        )


class _FastHalves(torch.autograd.Function):
    """The two halves of a layer's outputs; the backward takes their gradients as they come, without joining them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias).chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        half = weight.shape[0] // 2
        grad_rows = [grad.reshape(-1, half) for grad in grads]
        grad_x = grad_weight = None
        if torch.is_grad_enabled():  # create_graph=True
            joined = torch.cat(grad_rows, dim=-1)
            grad_x = (joined @ weight).view(x.shape) if needs_x else None
            grad_weight = joined.t() @ rows if needs_weight else None
        else:
            if needs_x:
                grad_x = _product("grad_input", grad_rows[0], weight[:half])
                if _way("grad_input", rows) == "default":
                    grad_x.addmm_(grad_rows[1], weight[half:])
                else:
                    grad_x.add_(_product("grad_input", grad_rows[1], weight[half:]))
                grad_x = grad_x.view(x.shape)
            if needs_weight:
                grad_weight = torch.empty_like(weight)
                for part, grad in zip(grad_weight.chunk(2), grad_rows, strict=True):
                    if _way("grad_weight", rows) == "default":
                        torch.mm(grad.t(), rows, out=part)
                    else:
                        part.copy_(_product("grad_weight", grad, rows))
        return grad_x, grad_weight, torch.cat([grad.sum(0) for grad in grad_rows]) if needs_bias else None


# ---------------------------------------------------------------------------------------------------------------------
# The layers of a model
# ---------------------------------------------------------------------------------------------------------------------
def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is exactly an `nn.Linear` with nothing around it: calling it multiplies, and does no more.

    Not one where a library has put another layer in its place (an adapter, quantised weights), another `forward`
    (offloaded weights) or a hook.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(own):
        return False
    return torch.compiler.is_compiling() or not nn.modules.module._has_any_global_hook()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by `fast_linear` where the layer is bare.

    The layers of the models are plain `nn.Linear`s, because that is what other libraries look for: a subclass is passed
    over without a word where they ask for the exact type (bitsandbytes), and loses its own `forward` where they do not
    (quanto). Who runs a model's layer calls this.

    Args:
        layer: An `nn.Linear`, or what a library has put in its place.
        x: [..., i].

    Returns:
        [..., o].
    """
    if is_bare(layer):
        return fast_linear(x, cast(Tensor, layer.weight), cast("Tensor | None", layer.bias))
    return cast(Tensor, layer(x))


def halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`layer(x).chunk(2, dim=-1)`, for a layer whose outputs are two things.

    In training on CPU it spares the copy by which autograd joins the gradients of the two, where the layer is bare.

    Args:
        layer: An `nn.Linear` with an even number of outputs, or what a library has put in its place.
        x: [..., i].

    Returns:
        Two views [..., o / 2].
    """
    if is_bare(layer) and torch.is_grad_enabled():
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        needs_grad = any(t is not None and t.requires_grad for t in (x, weight, bias))
        if needs_grad and weight.shape[0] % 2 == 0 and _may_choose(x, weight, bias):
            return _FastHalves.apply(x, weight, bias)
    first, second = linear(layer, x).chunk(2, dim=-1)
    return first, second


def as_input_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Numbers in the dtype that a layer computes in: that of its weight, unless the weight is quantised to integers."""
    weight = cast(Tensor, layer.weight)
    return x.to(weight.dtype) if weight.is_floating_point() else x


__all__ = [
    "LinearChoice",
    "ProductChoice",
    "as_input_of",
    "fast_linear",
    "halves",
    "is_bare",
    "linear",
    "linear_choice",
]
