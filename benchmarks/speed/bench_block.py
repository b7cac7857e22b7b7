"""Mamba blocks on CPU: EhrMamba's against transformers' own, and against nothing but their matrix products.

All figures are CPU seconds of one step, medians over rounds in which the ways take turns, at batch size 1:

    train_512       forward and backward of one block, L=512; the peer is transformers' block as it comes: a Python
                    loop whose backward is quadratic in length (half a minute a step)
    train_2048      the same at L=2048, where the peer is transformers' block with mambapy's scan (left out where it is
                    missing: `pip install mambapy`)
    forward         32 blocks without gradients, L=1024, against 32 of transformers'
    matmuls         one block at L=2048, without gradients and in training, against its four matrix products alone, by
                    the same `linear`: how near the block is to the limit

All in float32 and in bfloat16; the peers are float32 throughout (mambapy's scan refuses bfloat16). Both
sides have the same weights; outputs and gradients are compared once before the clock runs.

    python -m benchmarks.speed.bench_block --output runs/bench/block.json
    python -m benchmarks.speed.bench_block --only matmuls forward
    python -m benchmarks.speed.bench_block --quick
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.fast_linear import linear, linear_choice
from ehrseq.modeling.mamba_block import EhrMambaBlock

SHORT = 64  # length at which results are compared: the peer's quadratic backward does not hurt there yet
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What is measured; `--quick` has small ones."""

    width: int = 768
    layers: int = 32
    short: int = 512
    medium: int = 1024
    long: int = 2048


class Stack(nn.Module):
    """Blocks one after the other, whatever else each of them returns."""

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        for block in self.blocks:
            out = block(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


class MatrixProducts(nn.Module):
    """The four products of a block and nothing else, each from its own input, as large as in the block."""

    def __init__(self, config: EhrMambaConfig, length: int, dtype: torch.dtype):
        super().__init__()
        d, e, n, r = config.hidden_size, config.intermediate_size, config.state_size, int(config.time_step_rank)
        shapes = [(d, 2 * e), (e, r + 2 * n), (r, e), (e, d)]
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes).to(dtype)
        self.inputs = [torch.randn(1, length, i).to(dtype).requires_grad_() for i, _ in shapes]
        self.grads = [torch.randn(1, length, o).to(dtype) for _, o in shapes]

    def run_forward(self) -> None:
        """The products of a forward."""
        with torch.no_grad():
            for layer, x in zip(self.layers, self.inputs, strict=True):
                linear(layer, x)

    def run_training(self) -> None:
        """The products of a forward and a backward: for the inputs and for the weights."""
        for layer, x, grad in zip(self.layers, self.inputs, self.grads, strict=True):
            torch.autograd.grad(linear(layer, x), [x, layer.weight], grad)


def make_stacks(layers: int, width: int, dtype: torch.dtype, *, mambapy: bool = False) -> dict[str, nn.Module]:
    """Both stacks of blocks with the same weights, in training mode; ours in the dtype, the peer in float32."""
    torch.manual_seed(0)
    ours = Stack(EhrMambaBlock(EhrMambaConfig(hidden_size=width, num_hidden_layers=layers)) for _ in range(layers))
    for block in ours.blocks:
        block.mixer.reset_parameters()
    config = MambaConfig(hidden_size=width, num_hidden_layers=layers, use_mambapy=mambapy)
    peer = Stack(MambaBlock(config, layer_idx=index) for index in range(layers))
    peer.load_state_dict(ours.state_dict())
    return {"transformers": peer.train(), "ehrseq": ours.to(dtype).train()}


def training_step(block: nn.Module, hidden: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward: [output, gradient of the input, of every weight]."""
    hidden = hidden.clone().requires_grad_()
    leaves = [hidden, *(parameter for _, parameter in sorted(block.named_parameters()))]

    def step() -> list[Tensor]:
        out = block(hidden)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    return step


def forward_step(block: nn.Module, hidden: Tensor) -> Callable[[], list[Tensor]]:
    """A function that runs one forward without gradients."""

    def step() -> list[Tensor]:
        with torch.no_grad():
            return [block(hidden)]

    return step


def worst_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of two lists of results, each relative to the norm."""
    pairs = zip(one, other, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item() for a, b in pairs)


def against_peer(
    stacks: dict[str, nn.Module], length: int, width: int, repeats: int, *, training: bool, ours_a_turn: int = 1
) -> dict[str, Any]:
    """Compare results at a short length, then time both."""
    hidden, grad = torch.randn(1, length, width), torch.randn(1, length, width)

    def step_of(stack: nn.Module, tokens: int) -> Callable[[], list[Tensor]]:
        x = hidden[:, :tokens].to(next(stack.parameters()).dtype)
        return training_step(stack, x, grad[:, :tokens]) if training else forward_step(stack, x)

    short = {name: step_of(stack, min(SHORT, length))() for name, stack in stacks.items()}
    steps = {name: step_of(stack, length) for name, stack in stacks.items()}
    steps["ehrseq"]()  # the peer's steps are long: they need no warming up
    costs = in_turns(steps, repeats, calls={"ehrseq": ours_a_turn})
    return {
        "length": length,
        "peer_cpu_seconds": costs["transformers"].cpu,
        "cpu_seconds": costs["ehrseq"].cpu,
        "ratio": costs["transformers"].cpu / costs["ehrseq"].cpu,
        "worst_relative_difference": worst_difference(short["ehrseq"], short["transformers"]),
        "all_cpu_seconds": {name: cost.cpu_all for name, cost in costs.items()},
    }


def against_matmuls(sizes: Sizes, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One block over its matrix products alone, forward and training."""
    config = EhrMambaConfig(hidden_size=sizes.width, num_hidden_layers=1)
    block = EhrMambaBlock(config)
    block.mixer.reset_parameters()
    stack = Stack([block]).to(dtype)
    products = MatrixProducts(config, sizes.long, dtype)
    hidden, grad = (torch.randn(1, sizes.long, sizes.width).to(dtype) for _ in range(2))
    result: dict[str, Any] = {"length": sizes.long}
    for name, whole, alone in (
        ("forward", forward_step(stack, hidden), products.run_forward),
        ("training", training_step(stack, hidden, grad), products.run_training),
    ):
        costs = in_turns({"block": whole, "matmuls": alone}, repeats, warm_up=2)
        result[name] = {
            "cpu_seconds": costs["block"].cpu,
            "matmul_cpu_seconds": costs["matmuls"].cpu,
            "ratio": costs["block"].cpu / costs["matmuls"].cpu,
            "beside_them_ms": 1e3 * (costs["block"].cpu - costs["matmuls"].cpu),
        }
    return result


def measure(sizes: Sizes, only: list[str], repeats: int) -> dict[str, Any]:
    """The asked figures."""
    choices = {name: linear_choice(dtype) for name, dtype in DTYPES.items()}
    result: dict[str, Any] = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "repeats": repeats,
        "linear": {name: str(choice) for name, choice in choices.items()},
        "linear_ways": {
            name: {operation: product.way for operation, product in choice.products.items()}
            for name, choice in choices.items()
        },
    }
    if "train_512" in only:
        for name, dtype in DTYPES.items():
            stacks = make_stacks(1, sizes.width, dtype)
            result[f"train_512_{name}"] = against_peer(
                stacks, sizes.short, sizes.width, repeats, training=True, ours_a_turn=5
            )  # ours is short: several steps a turn give a steadier median
    if "train_2048" in only and find_spec("mambapy"):
        for name, dtype in DTYPES.items():
            stacks = make_stacks(1, sizes.width, dtype, mambapy=True)
            result[f"train_2048_{name}"] = against_peer(stacks, sizes.long, sizes.width, repeats, training=True)
    if "forward" in only:
        for name, dtype in DTYPES.items():
            stacks = make_stacks(sizes.layers, sizes.width, dtype)
            result[f"forward_{name}"] = against_peer(stacks, sizes.medium, sizes.width, repeats, training=False)
    if "matmuls" in only:
        for name, dtype in DTYPES.items():
            result[f"matmuls_{name}"] = against_matmuls(sizes, dtype, 3 * repeats)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a result as Markdown."""
    print("| figure | peer, CPU-s | ehrseq, CPU-s | ratio | worst difference |\n|---|---:|---:|---:|---:|")
    for name, entry in result.items():
        if isinstance(entry, dict) and "ratio" in entry:
            print(
                f"| {name}, L={entry['length']} | {entry['peer_cpu_seconds']:.3f} | {entry['cpu_seconds']:.3f} | "
                f"{entry['ratio']:.1f}x faster | {entry['worst_relative_difference']:.1e} |"
            )
        elif isinstance(entry, dict) and "forward" in entry:
            for way in ("forward", "training"):
                own = entry[way]
                print(
                    f"| {name}, {way}, L={entry['length']} | {own['matmul_cpu_seconds']:.3f} | "
                    f"{own['cpu_seconds']:.3f} | {own['ratio']:.2f}x them ({own['beside_them_ms']:.0f} ms more) | |"
                )


def main() -> None:
    """Measure, print and, if asked, write the result."""
    figures = ["train_512", "train_2048", "forward", "matmuls"]
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--only", nargs="+", choices=figures, default=figures, help="these figures")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch for both")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # the peer says at every start that its CUDA kernels are missing
    sizes = Sizes(width=64, layers=2, short=64, medium=64, long=128) if options.quick else Sizes()
    result = measure(sizes, options.only, options.repeats)
    show(result)
    finish(result, options.output, show=False)


if __name__ == "__main__":
    main()
