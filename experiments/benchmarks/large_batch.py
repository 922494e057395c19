"""A whole training step of any batch size in bounded memory, beside the plain step.

    OMP_NUM_THREADS=1 python -m recsys.experiments.benchmarks.large_batch --batch 65536

A small transformer text encoder (2 layers, width 128, random weights) learns inside the item tower;
every example has another item, with a text of at most 16 tokens, and a history of 5. A step is
forward, backward, clipping and optimiser, dropout on. "bounded": texts in chunks with cached
gradients (towers/text.py), the score matrix in tiles (towers/logits.py). "plain": both whole. Each
step has a process of its own, whose peak resident memory is read. The plain step grows with the
batch and its square; what it would need at the large size is reckoned from the small ones.

First, without dropout, the loss and the gradients of both are compared at an odd size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.experiments.benchmarks.prepare import peak

if TYPE_CHECKING:
    import torch

    from recsys.features.batching.batch import UserSide
    from recsys.towers.two_tower import TwoTower

WORDS, WORDS_A_TEXT, HISTORY = 8000, (4, 14), 5
WIDTH, LAYERS, TOKENS, DIMENSION = 128, 2, 16, 64
SMALL = (1024, 4096, 16_384)
ODD = 517
ROOM = 24.0
"""GiB that the bounded step has to stay under."""


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words by Zipf's law, all distinct."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, WORDS + 1)
    ends = np.cumsum(chance / chance.sum())
    words = np.array(["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(WORDS)])
    lengths = rng.integers(*WORDS_A_TEXT, count)
    drawn = words[np.searchsorted(ends, rng.random(lengths.sum())).clip(0, WORDS - 1)]
    stops = np.cumsum(lengths)
    return [f"{' '.join(part)} {number}" for number, part in enumerate(np.split(drawn, stops[:-1]))]


def towers(items: int, chunk: int | None, dropout: float) -> TwoTower:
    """Towers over `items` rows beside row 0, with the transformer inside, seeded."""
    import torch

    from recsys.features.text.encoder import fit_encoder
    from recsys.features.text.rules import SmallTransformerText
    from recsys.features.text.tokens import tokenise
    from recsys.towers.embedding import FeatureTable
    from recsys.towers.rules import TowerRules
    from recsys.towers.text import TextTower
    from recsys.towers.two_tower import TwoTower

    written = texts(items)
    rules = SmallTransformerText(layers=LAYERS, dimension=WIDTH, epochs=0)
    # Of some of them, so that every size has the same encoder.
    encoder = fit_encoder(texts(ODD), rules)
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    table, users = FeatureTable(items + 1), FeatureTable(items + 1)
    torch.manual_seed(0)
    shape = TowerRules(dimension=DIMENSION, history="mean", dropout=dropout, id_dropout=2 * dropout)
    from dataclasses import replace

    return TwoTower(
        shape, table, users, replace(table.spec(items + 1, {}), text=WIDTH), users.spec(0, {}),
        texts=TextTower(encoder, tokenise(encoder, ["", *written]), chunk=chunk),
    )  # fmt: skip


def side(batch: int) -> UserSide:
    """Users who had items of the batch."""
    import torch

    from recsys.features.batching.batch import UserSide

    random = torch.Generator().manual_seed(0)
    return UserSide(
        torch.zeros(batch, dtype=torch.int64),
        torch.randint(0, batch, (batch * HISTORY,), generator=random),
        torch.full((batch,), HISTORY),
        torch.zeros(batch, 0, dtype=torch.int64),
    )


def loss_of(model: TwoTower, batch: int, tile: int | None) -> torch.Tensor:
    """() loss of a step: example b chose candidate b."""
    import torch

    from recsys.towers.logits import BatchLogits
    from recsys.towers.losses import softmax

    embedded = model.embed_items(torch.arange(1, batch + 1))
    users = model.encode_users(side(batch), embedded)
    logits = BatchLogits(
        users=users,
        items=model.item_tower(embedded),
        target=torch.arange(batch),
        temperature=0.1,
        # Every item is drawn with the same chance, 1 - (1 - 1/batch)^(batch - 1).
        log_weight=torch.full((batch,), 0.46),
        tile=tile,
    )
    return softmax(logits).mean()


def step(batch: int, chunk: int | None, tile: int | None) -> dict[str, float]:
    """One step in this process: its seconds, its peak, and what was resident before, in GiB."""
    from recsys.towers.optimizer import RowAdam, clip_gradients

    model = towers(batch, chunk, dropout=0.1).train()
    optimizer = RowAdam(model.parameters(), lr=1e-3)
    before = resident()
    start, busy = time.perf_counter(), time.process_time()
    loss = loss_of(model, batch, tile)
    middle = time.perf_counter()
    loss.backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    return {
        "loss": loss.item(),
        "forward_seconds": middle - start,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "before_gib": before,
        "peak_gib": peak(),
    }


def resident() -> float:
    """GiB that this process holds now."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**20
    return peak()


def equal(batch: int, chunk: int, tile: int) -> dict[str, float]:
    """Largest differences between the bounded and the plain step, relative to the largest value."""
    import torch

    found = []
    for some in ((None, None), (chunk, tile)):
        model = towers(batch, some[0], dropout=0.0).train()
        loss = loss_of(model, batch, some[1])
        loss.backward()
        gradients = {
            name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None
        }
        found.append((loss.item(), gradients))
    (plain, wanted), (bounded, got) = found
    assert wanted.keys() == got.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    apart = max(float((got[name] - g).abs().max()) for name, g in wanted.items())
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    distance = torch.stack([(got[name] - g).norm() for name, g in wanted.items()]).norm()
    return {
        "batch": batch,
        "loss": plain,
        "loss_apart": abs(plain - bounded),
        "gradient_apart": apart / largest,
        "gradient_distance": float(distance / norm),
    }


def measure(batch: int, chunk: int | None, tile: int | None) -> dict[str, float]:
    """A step in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--only", json.dumps([batch, chunk, tile])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def reckoned(batch: int, plain: dict[int, dict[str, float]]) -> float:
    """GiB of the plain step at a large size: a + b·batch + c·batch² through the small ones."""
    import numpy as np

    sizes = np.array(sorted(plain), np.float64)
    peaks = [plain[int(size)]["peak_gib"] - plain[int(size)]["before_gib"] for size in sizes]
    return float(np.polyval(np.polyfit(sizes, peaks, 2), batch))


def run(batch: int, chunk: int, tile: int) -> dict[str, Any]:
    """Compare at an odd size, measure both at small sizes and the bounded step at the large one."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    same = equal(ODD, chunk=1000, tile=100)
    say(f"equal: {same}")
    steps: dict[str, dict[int, dict[str, float]]] = {"plain": {}, "bounded": {}}
    for size in SMALL:
        # Chunks and tiles smaller than these batches, so that something is bounded.
        for kind, some in (("plain", (None, None)), ("bounded", (min(chunk, 4096), 256))):
            steps[kind][size] = measure(size, *some)
            say(f"{kind} {size:,}: {steps[kind][size]}")
    steps["bounded"][batch] = measure(batch, chunk, tile)
    say(f"bounded {batch:,}: {steps['bounded'][batch]}")
    return {
        "batch": batch,
        "chunk": chunk,
        "tile": tile,
        "equal": same,
        "plain_would_need_gib": reckoned(batch, steps["plain"]),
        **steps,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    same, batch = result["equal"], result["batch"]
    lines = [
        f"at {same['batch']} examples: loss {same['loss']:.6f}, apart {same['loss_apart']:.1e}; "
        f"gradients apart {same['gradient_apart']:.1e} of the largest entry, "
        f"{same['gradient_distance']:.1e} of their norm",
        f"{'batch':>8}{'':>10}{'seconds':>10}{'of CPU':>8}{'peak GiB':>10}{'of the step':>13}",
    ]
    for kind in ("plain", "bounded"):
        for size, found in result[kind].items():
            more = found["peak_gib"] - found["before_gib"]
            lines.append(
                f"{int(size):>8,}{kind:>10}{found['seconds']:>10.1f}{found['cpu_seconds']:>8.1f}"
                f"{found['peak_gib']:>10.2f}"
                f"{more:>13.2f}"
            )
    lines.append(
        f"the plain step of {batch:,} would need {result['plain_would_need_gib']:.0f} GiB; "
        f"the bounded one has to stay under {ROOM:.0f}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line; see the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m recsys.experiments.benchmarks.large_batch")
    parser.add_argument("--batch", type=int, default=65_536)
    parser.add_argument("--chunk", type=int, default=16_384, help="tokens at once")
    parser.add_argument("--tile", type=int, default=512, help="rows of the score matrix at once")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(step(*asked.only)))
        return
    result = run(asked.batch, asked.chunk, asked.tile)
    print(table(result), end="")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
