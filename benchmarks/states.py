"""What states as values cost beside the call that makes them: `start=`, 16 users stacked and taken apart, a guard, a file.

python benchmarks/states.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import Adapted, compile_unroll, optim

USERS = 16
K = 5


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """MAML's sine network, and ten points for each user."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return model, torch.randn(USERS, 10, 1), torch.randn(USERS, 10, 1)


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    """Two blocks of convolutions, and five images for each user."""
    block = [nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*block, nn.Flatten(), nn.Linear(16 * 36, 5))
    return model, torch.randn(USERS, 5, 1, 28, 28), torch.randint(5, (USERS, 5))


def require_equal(ones: list[Adapted], others: list[Adapted]) -> None:
    """Raises unless two lists of states are equal but for rounding."""
    for one, other in zip(ones, others, strict=True):
        for name, value in one.params.items():
            torch.testing.assert_close(value, other.params[name], rtol=1e-4, atol=1e-5)


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns median seconds of calls that are made by turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[rounds // 10 :]) for name, values in found.items()}


def measure(name: str, made: tuple[nn.Module, Tensor, Tensor], loss: Callable[..., Tensor], rounds: int, folder: Path) -> None:
    """Checks the numbers of one model, and prints its table."""
    model, x, y = made
    unroll = compile_unroll(model, optim.sgd(lr=0.01), K, loss=loss)
    many = unroll.vmap()
    with torch.inference_mode():
        users = [unroll.adapt((x[user], y[user])) for user in range(USERS)]
        batch = adaptrt.stack(users)
        require_equal(many.adapt((x, y), start=batch).unbind(), [unroll.adapt((x[u], y[u]), start=users[u]) for u in range(USERS)])
        users[0].save(folder / "user.safetensors")
        require_equal([unroll.load(folder / "user.safetensors")], [users[0]])

        def served() -> list[Tensor]:
            after = many.adapt((x, y), start=adaptrt.stack(users)).unbind()
            return [user.losses for user in after]  # which takes each user's values out of the batch

        known = users

        def served_again() -> list[Tensor]:
            nonlocal known
            known = many.adapt((x, y), start=adaptrt.stack(known)).unbind()
            return [user.losses for user in known]

        one, first = (x[0], y[0]), users[0]
        found = times(
            {
                "adapt": lambda: unroll.adapt(one),
                "adapt, start=": lambda: unroll.adapt(one, start=first),
                "adapt, start=, keep='not_worse'": lambda: unroll.adapt(one, start=first, keep="not_worse"),
                "16 users": lambda: many.adapt((x, y)),
                "16 users, start=": lambda: many.adapt((x, y), start=batch),
                "16 users stacked, adapted, unstacked": served,
                "16 users, the same once more": served_again,
                "16 users, start=, keep='not_worse'": lambda: many.adapt((x, y), start=batch, keep="not_worse"),
                "save": lambda: first.save(folder / "user.safetensors"),
                "load": lambda: unroll.load(folder / "user.safetensors"),
            },
            rounds,
        )
    print(f"\n{name}\n\n| call | microseconds | times the call alone |\n|---|---|---|")
    for call, seconds in found.items():
        alone = found["16 users" if call.startswith("16") else "adapt"]
        print(f"| {call} | {seconds * 1e6:,.0f} | {seconds / alone:.2f} |")


def main() -> None:
    """Prints a table in Markdown for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    rounds: int = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure("sine MLP 1-40-40-1, SGD, k = 5", mlp(), F.mse_loss, rounds, Path(folder))
        measure("two convolutions, 28 x 28, SGD, k = 5", conv(), F.cross_entropy, rounds // 5, Path(folder))


if __name__ == "__main__":
    main()
