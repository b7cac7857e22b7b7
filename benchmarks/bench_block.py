"""Training one Mamba block on CPU: EhrMamba's against transformers' own, same weights, same input, same run.

A training step is forward and backward for the input and every weight. Both blocks take turns, and process CPU time is
what counts, so that a busy machine slows both alike; the figure is the ratio of the medians. The peer's backward is
quadratic in length: a step of it takes about half a minute at the default sizes.

    python benchmarks/bench_block.py --repeats 5 --output runs/bench/block.json
"""

from collections.abc import Callable

import torch
import transformers
from harness import benchmark_parser, finish, in_turns
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.mamba_block import EhrMambaBlock

OURS_PER_PEER_STEP = 5  # ours is short: several steps a turn give a steadier median


def make_blocks(width: int) -> dict[str, nn.Module]:
    """Both blocks with the same weights, in training mode."""
    torch.manual_seed(0)
    ours = EhrMambaBlock(EhrMambaConfig(hidden_size=width, num_hidden_layers=1))
    ours.mixer.reset_parameters()
    peer = MambaBlock(MambaConfig(hidden_size=width, num_hidden_layers=1), layer_idx=0)
    peer.load_state_dict(ours.state_dict())
    return {"transformers": peer.train(), "ehrseq": ours.train()}


def training_step(block: nn.Module, hidden: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward: [output, gradient of the input, of every weight]."""
    hidden = hidden.clone().requires_grad_()
    leaves = [hidden, *(parameter for _, parameter in sorted(block.named_parameters()))]

    def step() -> list[Tensor]:
        out = block(hidden)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return step


def measure(batch: int, length: int, width: int, repeats: int) -> dict[str, object]:
    """Compare results once, then time the two blocks in turns."""
    blocks = make_blocks(width)
    hidden, grad = torch.randn(batch, length, width), torch.randn(batch, length, width)

    # At a short length, where the peer's quadratic backward does not hurt yet; it warms both up as well.
    short = min(length, 64)
    results = [training_step(block, hidden[:, :short], grad[:, :short])() for block in blocks.values()]
    differences = [((a - b).norm() / a.norm().clamp(min=1e-30)).item() for a, b in zip(*results, strict=True)]

    steps = {name: training_step(block, hidden, grad) for name, block in blocks.items()}
    steps["ehrseq"]()
    costs = in_turns(steps, repeats, calls={"ehrseq": OURS_PER_PEER_STEP})
    peer, ours = costs["transformers"], costs["ehrseq"]
    return {
        "batch": batch,
        "length": length,
        "width": width,
        "transformers_cpu_seconds": peer.cpu,
        "ehrseq_cpu_seconds": ours.cpu,
        "ratio": peer.cpu / ours.cpu,
        "ratio_of_fastest": min(peer.cpu_all) / min(ours.cpu_all),
        "worst_relative_difference": max(differences),
        "repeats": repeats,
        "cpu_seconds": {name: cost.cpu_all for name, cost in costs.items()},
    }


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch for both")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # the peer says at every start that its CUDA kernels are missing
    result = measure(options.batch, options.length, options.width, options.repeats)
    print("| block | CPU-s a training step | times faster |\n|---|---:|---:|")
    print(f"| transformers {transformers.__version__} | {result['transformers_cpu_seconds']:.2f} | 1 |")
    print(f"| ehrseq | {result['ehrseq_cpu_seconds']:.3f} | {result['ratio']:.0f} |")
    print(f"Worst relative difference of output and gradients: {result['worst_relative_difference']:.1e}")
    finish(result, options.output, show=False)


if __name__ == "__main__":
    main()
