"""What rounding the frozen base to float8 does to a slice: to its loss, its gradient and what it has learned.

    python benchmarks/fp8.py

Ways to scale are compared on the tiny Wan of examples/: none, one scale for each row, one for 64 (or 32) values in a
row. Each trains the same slice on the same character with the same noise, from the same start values in full precision.
Prints markdown for benchmarks/README.md.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny_world import World, fixed_inputs, shifted
from torch import Tensor

from utils.selective_finetune import attach_slice, block_linears
from wan.float8 import FLOAT8, round_matrix, turn_back

CHARACTER = 0  # number among the held-out pictures
PROMPT = "a picture of sks"
FF, FFID = "0.01", 1
RATE = 1e-3
WAYS = ("plain", "row", "64 values", "32 values")
WIDTH, STD = 5120, 0.02  # of a 14B model's matrices, roughly


@dataclass(frozen=True)
class Result:
    loss: float  # of the start, over all noise levels
    gradient: Tensor  # of the same
    change: Tensor  # what was learned


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to scale (default: all)")
    flags = parser.parse_args(argv)
    world = World()
    exact = train(world, world.base, flags.steps)
    names = matrices(world)
    wide = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0)) * STD
    print("| scale for each | bits a value | error, tiny Wan | error, std 0.02 | loss | gradient | change |")
    print("|---|---|---|---|---|---|---|")
    print(f"| not rounded | 16 | 0 | 0 | {exact.loss:.5f} | 1 | 1 |", flush=True)
    for way in flags.ways:
        base = world.base | {name: rounded(world.base[name], way) for name in names}
        error = distance([base[name] for name in names], [world.base[name] for name in names])
        found = train(world, base, flags.steps)
        cosines = [
            torch.cosine_similarity(getattr(found, part), getattr(exact, part), dim=0).item()
            for part in ("gradient", "change")
        ]
        bits = 8 + {"plain": 0, "row": 32 / WIDTH, "64 values": 0.5, "32 values": 1}[way]
        print(
            f"| {way} | {bits:.3g} | {error:.2%} | {distance([rounded(wide, way)], [wide]):.2%} | {found.loss:.5f} | "
            f"{cosines[0]:.4f} | {cosines[1]:.4f} |",
            flush=True,
        )


def matrices(world: World) -> list[str]:
    return [f"{name}.weight" for name in block_linears(world.model(world.base))]


def rounded(matrix: Tensor, way: str) -> Tensor:
    """What float8 makes of it, with one of WAYS to scale."""
    count = {"plain": matrix.shape[1], "row": matrix.shape[1], "64 values": 64, "32 values": 32}[way]
    groups = matrix.reshape(-1, math.gcd(count, matrix.shape[1]))
    stored = torch.empty_like(groups, dtype=FLOAT8)
    scales = round_matrix(groups, stored, scaled=way != "plain")
    return turn_back(stored, scales, torch.empty_like(groups)).view_as(matrix)


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The error's norm as a share of the values' own."""
    errors = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (errors / sum(b.square().sum() for b in exact)).sqrt().item()


def train(world: World, base: dict[str, Tensor], steps: int) -> Result:
    """The slice of `base` under which everything else is as in `base`, while its own values are the world's."""
    model = world.model(world.base)
    trained = attach_slice(model, FF, FFID)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(base[name])
    trained.write_back()
    latents = world.character(world.held_out[CHARACTER])
    noisy, t, target = fixed_inputs(latents)
    loss = (model(noisy, t, [world.text(PROMPT)] * len(t)) - target).square().mean()
    loss.backward()
    gradient = flat([parameter.grad for parameter in trained.parameters()])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=0)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        noise, u = torch.randn(latents.shape, generator=draw), torch.rand(len(latents), generator=draw)
        sigma = shifted(u)[:, None, None, None, None]
        mixed = (1 - sigma) * latents + sigma * noise
        predicted = model(mixed, 1000 * sigma.flatten(), [world.text(PROMPT)] * len(latents))
        (predicted - (noise - latents)).square().mean().backward()
        optimizer.step()
        trained.write_back()
    return Result(loss.item(), gradient, flat([parameter.detach() for parameter in trained.parameters()]))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


if __name__ == "__main__":
    main()
