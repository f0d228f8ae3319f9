"""python tests/benchmarks/attention_operator.py: SVD-Attention beside what it stands in for, on synthetic histories.

For every number of events N and of candidates M, the same batch of requests is answered by each operator, forward and
forward with backward (gradient of events, candidates and weights): best milliseconds of several runs, and the most
memory beyond the inputs. All project the same way: candidates are queries, W_K and W_V act on what is attended to.

    svd          SVD-Attention as SOLAR runs it: Gram, eigh, softmax over R interests
    softmax      candidates over all N events, scaled_dot_product_attention
    self         the N events over each other, scaled_dot_product_attention: what a history costs without candidates
    linear       linear attention (elu + 1), state of D / H x D / H a head
    pooling      LightSANs: R learned mixtures of events, then softmax over them
    svd_lowrank  the same interests by torch.svd_lowrank            thin svd   by torch.linalg.svd
    limit        the products that the svd form cannot avoid, softmax and decomposition, each alone in float32

A second table lists the limit part by part, a third where svd and softmax cost the same.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidate_sets import CandidateSets
from models.interest_checkpoints import checkpoint_interests
from models.interface import ModelInput
from models.svd_attention import Decomposition, Interests, SvdAttention

HEADS = 2
LEAST_SECONDS, MOST_RUNS, SLOW_SECONDS = 0.5, 20, 3.0
SELF_MOST_EVENTS = 20_000
"""Beyond this self-attention takes minutes: its cost grows with N squared and is not measured."""
DECOMPOSED_MOST_EVENTS = 20_000
"""Beyond this svd_lowrank and the thin SVD are not run."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch: events, queries, and where they belong."""

    events: int
    candidates: int
    batch: int
    width: int
    rank: int
    device: torch.device

    @property
    def event_ND(self) -> Tensor:
        """Layer-normalised events of about `rank` strong directions, as event vectors of a trained model are."""
        generator = torch.Generator().manual_seed(0)
        strength_D = torch.arange(1, self.width + 1) ** -0.5
        event_ND = torch.randn(self.batch * self.events, self.width, generator=generator) * strength_D
        return F.layer_norm(event_ND, (self.width,)).to(self.device).requires_grad_()

    @property
    def query_MD(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        query_MD = torch.randn(self.batch * self.candidates, self.width, generator=generator)
        return query_MD.to(self.device).requires_grad_()

    @property
    def inputs(self) -> ModelInput:
        """The layout alone: no operator reads items or times."""
        none = torch.zeros(0, dtype=torch.long)
        requests = torch.arange(self.batch)
        return ModelInput(
            item_IC=torch.zeros(0, self.width),
            features_IFC=torch.zeros(0, 0, self.width),
            user_features_UGC=torch.zeros(self.batch, 0, self.width),
            event_offsets_U1=torch.arange(self.batch + 1) * self.events,
            event_item_N=none,
            event_time_N=none,
            event_action_N=none,
            event_label_N=none,
            request_user_B=requests,
            request_position_B=torch.full_like(requests, self.events),
            request_time_B=torch.zeros_like(requests),
            candidate_offsets_B1=torch.arange(self.batch + 1) * self.candidates,
            candidate_item_M=none,
        )


def operators(case: Case) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]]:
    """Name -> (out_MD from event_ND and query_MD, its weights)."""
    torch.manual_seed(0)
    inputs, rank, width, batch = case.inputs, case.rank, case.width, case.batch
    sets = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=case.device)
    compact = SvdAttention(width, num_heads=HEADS).to(case.device)
    key_value = nn.Linear(width, 2 * width, bias=False).to(case.device)
    query_key_value = nn.Linear(width, 3 * width, bias=False).to(case.device)
    pool = nn.Linear(width, rank, bias=False).to(case.device)
    every = torch.arange(batch, device=case.device)

    def heads(value: Tensor) -> Tensor:
        """[batch, heads, rows, D / H] of [batch x rows, D]."""
        return value.unflatten(1, (HEADS, width // HEADS)).unflatten(0, (batch, -1)).transpose(1, 2)

    def svd(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        interests, place_B = checkpoint_interests(
            event_ND,
            event_offsets_U1=inputs.event_offsets_U1,
            request_user_B=inputs.request_user_B,
            request_position_B=inputs.request_position_B,
            every=1,
            how=Decomposition(rank=rank),
        )
        return compact(query_MD, interests=interests, checkpoint_B=place_B, candidates=sets)

    def softmax(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        key, value = map(heads, key_value(event_ND).chunk(2, dim=1))
        return F.scaled_dot_product_attention(heads(query_MD), key, value)

    def self_attention(event_ND: Tensor, _: Tensor) -> Tensor:
        query, key, value = map(heads, query_key_value(event_ND).chunk(3, dim=1))
        return F.scaled_dot_product_attention(query, key, value)

    def linear(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        key, value = map(heads, key_value(event_ND).chunk(2, dim=1))
        key, query = F.elu(key) + 1, F.elu(heads(query_MD)) + 1
        return query @ (key.mT @ value) / (query @ key.sum(2)[..., None])

    def pooling(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        weight_BNR = torch.softmax(pool(event_ND).unflatten(0, (batch, -1)), 1)
        return read(weight_BNR.mT @ event_ND.unflatten(0, (batch, -1)), query_MD)

    def read(interest_BRD: Tensor, query_MD: Tensor) -> Tensor:
        interests = Interests(
            interest_KRD=interest_BRD,
            valid_KR=torch.ones(interest_BRD.shape[:2], dtype=torch.bool, device=case.device),
            singular_KR=interest_BRD.detach().norm(dim=2),
            energy_K=interest_BRD.detach().square().sum((1, 2)),
        )
        return compact(query_MD, interests=interests, checkpoint_B=every, candidates=sets)

    def svd_lowrank(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        _, singular_BR, right_BDR = torch.svd_lowrank(event_ND.unflatten(0, (batch, -1)), q=rank)
        return read((right_BDR * singular_BR[:, None]).mT / math.sqrt(case.events), query_MD)

    def thin_svd(event_ND: Tensor, query_MD: Tensor) -> Tensor:
        _, singular_BD, right_BDD = torch.linalg.svd(event_ND.unflatten(0, (batch, -1)), full_matrices=False)
        interest_BRD = singular_BD[:, :rank, None] * right_BDD[:, :rank]
        return read(interest_BRD / math.sqrt(case.events), query_MD)

    found = {
        "svd": (svd, compact),
        "softmax": (softmax, key_value),
        "linear": (linear, key_value),
        "pooling": (pooling, nn.ModuleList([pool, compact])),
    }
    if case.events <= SELF_MOST_EVENTS:
        found["self"] = (self_attention, query_key_value)
    if case.events <= DECOMPOSED_MOST_EVENTS:
        found |= {"svd_lowrank": (svd_lowrank, compact), "thin svd": (thin_svd, compact)}
    return found


def limit(case: Case) -> dict[str, tuple[float, float]]:
    """Part -> milliseconds (forward, forward and backward) of the least work of the svd form, each in float32 alone."""
    batch, heads, head_width = case.batch, HEADS, case.width // HEADS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device)

    event, query = normal(batch, case.events, case.width), normal(batch * heads, case.candidates, head_width)
    key, weight = normal(batch * heads, case.rank, head_width), normal(batch * heads, case.candidates, case.rank)
    gram, interest = event.mT @ event, normal(batch * case.rank, case.width)
    square, soft = normal(case.width, case.width), torch.softmax(weight, -1)
    parts = {
        "Gram X^T X; backward X G": (lambda: event.mT @ event, lambda: event @ gram),
        "eigh; backward V F V^T": (lambda: torch.linalg.eigh(gram), lambda: gram @ (gram.mT @ gram) @ gram.mT),
        "P W_K, P W_V": (
            lambda: (interest @ square, interest @ square),
            lambda: [interest @ square for _ in range(2)] + [interest.T @ interest for _ in range(2)],
        ),
        "Q K^T": (lambda: query @ key.mT, lambda: (weight @ key, weight.mT @ query)),
        "softmax": (
            lambda: torch.softmax(weight, -1),
            lambda: torch.ops.aten._softmax_backward_data(weight, soft, -1, soft.dtype),
        ),
        "A V": (lambda: soft @ key, lambda: (query @ key.mT, soft.mT @ query)),
    }
    found = {}
    for name, (forward, backward) in parts.items():
        there = 1e3 * seconds_of(forward, case.device).best
        found[name] = (there, there + 1e3 * seconds_of(backward, case.device).best)
    return found


def measure(run: Callable[[Tensor, Tensor], Tensor], weights: nn.Module, case: Case) -> tuple[float, float, float]:
    """(milliseconds forward, milliseconds forward and backward, MiB beyond the inputs)."""
    event_ND, query_MD = case.event_ND, case.query_MD

    def forward() -> None:
        with torch.no_grad():
            run(event_ND, query_MD)

    def both() -> None:
        event_ND.grad = query_MD.grad = None
        weights.zero_grad(set_to_none=True)
        out = run(event_ND, query_MD)
        out.backward(torch.ones_like(out))

    with_gradient = seconds_of(both, case.device)
    return 1e3 * seconds_of(forward, case.device).best, 1e3 * with_gradient.best, with_gradient.peak / 2**20


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of the best run, and bytes at most beyond those held before the first."""

    best: float
    peak: int


def seconds_of(step: Callable[[], object], device: torch.device) -> Timed:
    """Best of several runs after a first one; what takes seconds is run once."""
    peak, first = peak_memory(step, device)
    if first > SLOW_SECONDS:
        return Timed(first, peak)
    best, total, runs = math.inf, 0.0, 0
    while runs < 3 or (total < LEAST_SECONDS and runs < MOST_RUNS):
        seconds = timed(step, device)
        best, total, runs = min(best, seconds), total + seconds, runs + 1
    return Timed(best, peak)


def timed(step: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """(bytes at most beyond those held before, seconds); on a CPU the resident set, whose peak Linux can reset."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(step, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # What was freed before must not serve this run unseen.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds = timed(step, device)
    return max(0, resident("VmHWM") - before), seconds


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 20, 1_000, 4_000])
    parser.add_argument("--batch", type=int, default=8, help="requests, each of another user")
    parser.add_argument("--width", type=int, nargs="+", default=[64])
    parser.add_argument("--rank", type=int, nargs="+", default=[32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--operators", nargs="+", default=None, help="only these (default: all)")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {machine}, batch {options.batch}, {HEADS} heads\n")
    columns = f"{'operator':<12} {'fwd ms':>9} {'fwd+bwd ms':>11} {'MiB':>8} {'x limit':>8}"
    print(f"{'D':>4} {'R':>3} {'N':>7} {'M':>5}  {columns}")
    times: dict[tuple, float] = {}
    for width, rank, events, candidates in itertools.product(
        options.width, options.rank, options.events, options.candidates
    ):
        case = Case(events, candidates, options.batch, width, rank, device)
        place = f"{width:>4} {rank:>3} {events:>7,} {candidates:>5,}"
        parts = limit(case)
        least = [sum(part[i] for part in parts.values()) for i in (0, 1)]
        print(f"{place}  {'limit':<12} {least[0]:>9.2f} {least[1]:>11.2f}", flush=True)
        for name, (run, weights) in operators(case).items():
            if options.operators and name not in options.operators:
                continue
            if name == "self" and candidates != options.candidates[-1]:
                continue  # It has no candidates.
            there, both, memory = measure(run, weights, case)
            times[width, rank, events, candidates, name] = both
            ratio = f"{there / least[0]:.1f}/{both / least[1]:.1f}"
            print(f"{place}  {name:<12} {there:>9.2f} {both:>11.2f} {memory:>8.0f} {ratio:>8}", flush=True)
    print(f"\nthe limit at N = {events:,}, M = {candidates:,}, D = {width}, R = {rank}:")
    for name, (there, both) in parts.items():
        print(f"  {name:<26} {there:>9.2f} {both:>11.2f}")
    print("\nsoftmax / svd, forward and backward (above 1: SVD-Attention is faster)")
    for width, rank, events in itertools.product(options.width, options.rank, options.events):
        cells = [
            f"M={candidates:,}: {times[(*key, 'softmax')] / times[(*key, 'svd')]:.2f}"
            for candidates in options.candidates
            if (*(key := (width, rank, events, candidates)), "svd") in times and (*key, "softmax") in times
        ]
        print(f"  D={width} R={rank} N={events:,}:  " + "   ".join(cells))


if __name__ == "__main__":
    main()
