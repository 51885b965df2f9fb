"""What methods cost: CPU time of a run against the raw network's, and of CMI against its base's.

    python benchmarks/speed.py                                 every base, on the shipped garments
    python benchmarks/speed.py --bases DPS --batch 1 4 16 64    how cost grows; also --steps, --size
    python benchmarks/speed.py --bases DPS --processes 1 2      images a second of processes at once
    python benchmarks/speed.py --paper                          operations of the paper's Table I

Raw is one forward and one vector-Jacobian product a step: the least that a method with gradients
can take. Everything runs on one thread of one process, in turn (raw, base, CMI+base; again), and
ratios are those of neighbours, so that a machine that slows down slows both. Seconds are CPU time,
which other programs change little; a GPU's are wall time. Columns: milliseconds an image and step
of the base, its ratio to raw, that of CMI+base to the base (median, least to largest), CMI's steps.
Processes share the machine, so theirs is wall time, from the moment when all are ready.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmi_lightning import Problem, Sampler
from cmi_lightning.denoisers import Denoiser, card_unet, shipped_prior
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


def box(prior: Denoiser, batch: int, size: int, device: str) -> tuple[Problem, SampleNoise, Tensor]:
    """Return a box to fill in images of noise, its random numbers, and the images."""
    noise = SampleNoise(0, [str(i) for i in range(batch)])
    shape = (batch, prior.image_shape[0], size, size)  # type: ignore[index]
    x = noise.normal("image", 0, torch.zeros(shape, device=device)).clamp(-1, 1)
    return Problem.simulate(x, BoxMask(size // 2, margin=size // 8), 0.05, noise), noise, x


def measure(
    prior: Denoiser, base: str, batch: int, size: int, steps: int, args: argparse.Namespace
) -> str:
    """Return a table's line of one base, batch, size and number of steps."""
    problem, noise, x = box(prior, batch, size, args.device)
    guided = {"base": [BASES[base]], "cmi": [BASES[base], CMI(budget=args.budget)]}
    samplers = {name: Sampler(prior, DDPM(), g, steps) for name, g in guided.items()}
    work: dict[str, Callable[[], object]] = {
        "raw": lambda: raw(prior, x, steps),
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

    each = 1000 * statistics.median(spent["base"]) / steps / batch
    plan = samplers["cmi"].guidances[-1].plan()
    line = f"| {base} | {batch} | {size} | {steps} | {each:.1f} | {ratio('base', 'raw')} | "
    line += f"{ratio('cmi', 'base')} | {plan} |"
    return line


def chain_apart(ready: Barrier, base: str, args: argparse.Namespace) -> None:
    """Run a chain in a process of its own, from the moment when all are ready."""
    torch.set_num_threads(1)
    prior = shipped_prior(args.prior).to(args.device)
    problem, noise, x = box(prior, args.batch[0], args.size[0], args.device)
    Sampler(prior, DDPM(), [BASES[base]], 2).run(problem, noise, x)
    sampler = Sampler(prior, DDPM(), [BASES[base]], args.steps[0])
    ready.wait()
    sampler.run(problem, noise, x)
    ready.wait()


def at_once(processes: int, base: str, args: argparse.Namespace) -> float:
    """Return the images a second of several processes at once, each with a batch of its own."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=chain_apart, args=(ready, base, args)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    ready.wait()
    spent = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return processes * args.batch[0] / spent


def paper() -> None:
    """Print the operations of the paper's Table I: 1,000 images, 1,000 steps, 19 cells a network.

    A cell is DPS, ΠGDM, MCG or DSG on one of five tasks, MCG not on motion blur, each without CMI
    and with it. Operations are counted (two a multiplication and addition), not measured.
    """
    rows = 19 * 1000 * 1000 * (1 + 1.3)
    print("| network | 10⁹ operations, forward | product | 10¹⁸ operations, table |")
    print("|---|---:|---:|---:|")
    for name in ("ffhq-256", "imagenet-256"):
        with torch.device("meta"):
            network = card_unet(name).requires_grad_(False)
            x, counted = torch.zeros(1, 3, 256, 256, requires_grad=True), []
            with FlopCounterMode(display=False) as counter:
                y = network(x, torch.zeros(1))
            counted.append(counter.get_total_flops())
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(y.sum(), x)
            counted.append(counter.get_total_flops())
        each = " | ".join(f"{n / 1e9:.0f}" for n in counted)
        print(f"| {name} | {each} | {rows * sum(counted) / 1e18:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--prior", default="fashion-mnist")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--size", nargs="+", type=int, default=[32])
    parser.add_argument("--steps", nargs="+", type=int, default=[20])
    parser.add_argument("--processes", nargs="+", type=int, help="processes at once")
    parser.add_argument("--paper", action="store_true", help="count what Table I takes")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--compile", action="store_true", help="the network, by torch.compile")
    parser.add_argument("--fresh-memory", action="store_true", help="glibc's own settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.paper:
        return paper()
    torch.set_num_threads(1)
    if args.processes:
        print("| method | batch | processes | images a second |\n|---|---:|---:|---|")
        for base in args.bases:
            found: dict[int, list[float]] = {n: [] for n in args.processes}
            for _ in range(args.runs):
                for n in args.processes:
                    found[n].append(at_once(n, base, args))
            for n, each in found.items():
                spread = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
                print(f"| {base} | {args.batch[0]} | {n} | {spread} |", flush=True)
        return None
    if not args.fresh_memory:
        keep_memory()  # as predict and restore do
    prior = shipped_prior(args.prior).to(args.device)
    if args.compile:
        compile_networks(prior)
    print(f"{args.prior}, {args.device}, {args.runs} runs\n")
    print(
        "| method | batch | size | steps | ms an image and step | base / raw "
        "| CMI+base / base | CMI acts |"
    )
    print("|---|---:|---:|---:|---:|---|---|---|")
    for size, batch, steps in itertools.product(args.size, args.batch, args.steps):
        for base in args.bases:
            print(measure(prior, base, batch, size, steps, args), flush=True)
    return None


if __name__ == "__main__":
    main()
