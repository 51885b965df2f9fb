"""What methods cost: CPU time of a run against the raw network's, and of CMI against its base's.

    python benchmarks/speed.py                              every base, on the shipped garments
    python benchmarks/speed.py --bases DPS --steps 20 --batch 1 4 16

Raw is one forward and one vector-Jacobian product a step: the least that a method with gradients
can take. Everything runs on one thread of one process, in turn (raw, base, CMI+base; again), and
ratios are those of neighbours, so that a machine that slows down slows both. Seconds are CPU time,
which other programs change little; a GPU's are wall time. Columns: milliseconds an image and step
of the base, its ratio to raw, that of CMI+base to the base (median, least to largest), CMI's steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cmi_lightning import Problem, Sampler
from cmi_lightning.denoisers import Denoiser, shipped_prior
from cmi_lightning.denoisers.wrapped import compile_networks
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, Guidance, MomentMatching, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask
from cmi_lightning.predict.memory import keep_memory
from cmi_lightning.solvers import DDPM

BASES: dict[str, Guidance] = {
    "DPS": DPS(),
    "PiGDM": PiGDM(),
    "MCG": MCG(),
    "DSG": DSG(),
    "MomentMatching": MomentMatching(),
}


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU time of ``work``, or wall time where a GPU does it."""
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def raw(prior: Denoiser, like: Tensor, steps: int) -> None:
    """Run the network and one product a step, and nothing else."""
    for _, t, _ in prior.schedule.respace(steps).pairs():
        x = like.detach().requires_grad_()
        torch.autograd.grad(prior(x, t).x0, x, like)


def measure(prior: Denoiser, base: str, batch: int, size: int, args: argparse.Namespace) -> str:
    """Return a table's line of one base, batch and size."""
    noise = SampleNoise(0, [str(i) for i in range(batch)])
    shape = (batch, prior.image_shape[0], size, size)  # type: ignore[index]
    like = torch.zeros(shape, device=args.device)
    x = noise.normal("image", 0, like).clamp(-1, 1)
    problem = Problem.simulate(x, BoxMask(size // 2, margin=size // 8), 0.05, noise)
    guided = {"base": [BASES[base]], "cmi": [BASES[base], CMI(budget=args.budget)]}
    samplers = {name: Sampler(prior, DDPM(), g, args.steps) for name, g in guided.items()}
    work: dict[str, Callable[[], object]] = {
        "raw": lambda: raw(prior, x, args.steps),
        **{n: lambda s=s: s.run(problem, noise, x) for n, s in samplers.items()},  # type: ignore[misc]
    }
    spent: dict[str, list[float]] = {name: [] for name in work}
    for run in range(args.runs + 1):
        for name, one in work.items():
            took = seconds(one, args.device)
            if run:  # the first one warms up
                spent[name].append(took)

    def ratio(a: str, b: str) -> str:
        ratios = [p / q for p, q in zip(spent[a], spent[b], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    each = 1000 * statistics.median(spent["base"]) / args.steps / batch
    plan = samplers["cmi"].guidances[-1].plan()
    line = f"| {base} | {batch} | {size} | {each:.1f} | {ratio('base', 'raw')} | "
    line += f"{ratio('cmi', 'base')} | {plan} |"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--prior", default="fashion-mnist")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--size", nargs="+", type=int, default=[32])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--compile", action="store_true", help="the network, by torch.compile")
    parser.add_argument("--fresh-memory", action="store_true", help="glibc's own settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.fresh_memory:
        keep_memory()  # as predict and restore do
    prior = shipped_prior(args.prior).to(args.device)
    if args.compile:
        compile_networks(prior)
    print(f"{args.prior}, {args.steps} steps, {args.device}, {args.runs} runs\n")
    print(
        "| method | batch | size | ms an image and step | base / raw | CMI+base / base | CMI acts |"
    )
    print("|---|---:|---:|---:|---|---|---|")
    for size in args.size:
        for batch in args.batch:
            for base in args.bases:
                print(measure(prior, base, batch, size, args), flush=True)


if __name__ == "__main__":
    main()
