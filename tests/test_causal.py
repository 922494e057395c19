"""The causal transformer: packed against a loop, and what an entry may not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from history_cases import LENGTHS, N_ITEMS, SEED, D, entries_of, side, stirred
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.features.batching.batch import UserSide
from recsys.towers.causal_transformer import Blocks, CausalTransformer


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transformer(seed: int = 1, **options: object) -> CausalTransformer:
    chosen = {"layers": 2, "heads": 2, "hidden": 5, **options}
    return stirred(CausalTransformer(D, 30, **chosen), seed)  # type: ignore[arg-type, return-value]


def by_hand(model: CausalTransformer, x: Tensor) -> Tensor:
    """(L, D) one user's entries → (L, D), entry by entry and head by head."""
    length, heads = len(x), model.layers[0].heads
    d = D // heads
    x = x / x.norm(dim=1, keepdim=True) * D**0.5
    norm = torch.nn.functional.layer_norm
    for layer in model.layers:
        q, k, v = (
            layer.queries_keys_values(layer.before_attention(x)).view(length, 3, heads, d).unbind(1)
        )
        heard = torch.zeros(length, D).double()
        for h in range(heads):
            for i in range(length):
                left, right = q[i, h], k[: i + 1, h]  # (d,), (i + 1, d)
                back = (i - torch.arange(i + 1)).clamp(max=model.distance.shape[1] - 1)
                scores = right @ left + model.distance[h, back] * d**0.5
                weight = (scores / d**0.5).softmax(0)
                heard[i, h * d : (h + 1) * d] = (weight[:, None] * v[: i + 1, h]).sum(0)
        x = x + layer.out(heard)
        scaled = norm(x, (D,), layer.before_forward.weight, layer.before_forward.bias)
        x = x + layer.down(torch.nn.functional.gelu(layer.up(scaled)))
    return model.last(model.norm(x))


@given(LENGTHS, SEED)
@settings(max_examples=12, deadline=None)
def test_packed_entries_give_what_a_loop_over_users_gives(lengths: list[int], seed: int) -> None:
    model, asked = transformer(seed), side(lengths, seed)
    items = torch.randn(N_ITEMS, D, dtype=torch.float64, requires_grad=True)
    users = [by_hand(model, items[rows]) for rows in entries_of(asked)]
    slow = {
        "every": torch.cat(users),
        "last": torch.stack([x[-1] if len(x) else model.empty for x in users]),
    }
    everywhere = replace(asked, at=torch.arange(len(asked.history)))
    fast = {"every": model(items, everywhere), "last": model(items, asked)}
    learned = [items, *model.parameters()]
    for name in ("every", "last"):
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-6, atol=1e-6)
        if not fast[name].requires_grad:
            continue
        mix = torch.randn_like(slow[name])
        gradients = [
            torch.autograd.grad((out * mix).sum(), learned, retain_graph=True, allow_unused=True)
            for out in (fast[name], slow[name])
        ]
        for ours, theirs, weight in zip(*gradients, learned, strict=True):
            ours, theirs = (torch.zeros_like(weight) if g is None else g for g in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_later_entry_changes_no_earlier_answer() -> None:
    model, asked = transformer(), side([20, 3, 9])
    asked = replace(asked, at=torch.arange(32))
    items = torch.randn(32, D, dtype=torch.float64)
    asked = replace(asked, history=torch.arange(32))
    before = model(items, asked)
    changed = 14
    items[changed] = torch.randn(D)
    after = model(items, asked)
    same = torch.ones(32, dtype=torch.bool)
    same[changed:20] = False
    assert torch.equal(before[same], after[same])
    assert ((before - after)[~same].abs().amax(1) > 1e-9).all()


def test_no_entry_reads_that_of_another_user() -> None:
    model, items = transformer(), torch.randn(N_ITEMS, D, dtype=torch.float64)
    together = side([5, 0, 17, 2, 5], 3)
    parts = together.history.split(together.lengths.tolist())
    for user, rows in enumerate(parts):
        alone = replace(side([len(rows)]), history=rows)
        torch.testing.assert_close(model(items, together)[user], model(items, alone)[0])


def test_an_answer_in_the_middle_is_that_of_a_history_that_ends_there() -> None:
    """What is learned at every position is what is asked when serving, times included."""
    model = transformer(inputs=("recency", "weight"))
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 10**6, 12)).astype(float)
    items, weight = torch.randn(N_ITEMS, D, dtype=torch.float64), torch.rand(11).double() * 9
    asked = side([11], 5)
    gaps = torch.tensor(np.diff(times))
    everywhere = model(
        items, replace(asked, at=torch.arange(11), elapsed=gaps, event_weight=weight)
    )
    for end in range(1, 12):
        one = replace(
            asked,
            history=asked.history[:end],
            lengths=torch.tensor([end]),
            elapsed=torch.tensor(times[end] - times[:end]),
            event_weight=weight[:end],
        )
        torch.testing.assert_close(model(items, one)[0], everywhere[end - 1])


def test_the_transformer_starts_as_the_last_item() -> None:
    model, asked = CausalTransformer(D, 30, layers=2).eval(), side([4, 0, 1])
    items = torch.randn(N_ITEMS, D)
    unit = torch.nn.functional.normalize(items) * D**0.5
    unit = torch.nn.functional.layer_norm(unit, (D,))
    wanted = torch.stack([unit[asked.history[3]], model.empty, unit[asked.history[4]]])
    torch.testing.assert_close(model(items, asked), wanted)


def test_dropout_is_for_training_alone() -> None:
    model, asked = transformer(dropout=0.5), side([4, 9])
    items = torch.randn(N_ITEMS, D, dtype=torch.float64)
    assert torch.equal(model(items, asked), model(items, asked))
    model.train()
    assert not torch.equal(model(items, asked), model(items, asked))


@given(LENGTHS, st.sampled_from([0, 1, 2, 8]))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_every_entry_and_little_else(lengths: list[int], shortest: int) -> None:
    asked = side(lengths)
    user = torch.repeat_interleave(asked.lengths)
    place = torch.cat([torch.arange(n) for n in lengths])
    blocks = Blocks.of(asked.lengths, user, place, shortest)
    assert torch.equal(blocks.entries[blocks.back], torch.arange(len(user)))
    assert len(blocks.entries) == sum(n * w for n, w in blocks.shapes)
    assert sum(n for n, _ in blocks.shapes) == len(blocks.users) == sum(n > 0 for n in lengths)
    if shortest == 0:
        assert len(blocks.shapes) <= 1
    elif shortest == 1:
        assert len(blocks.entries) <= 2 * len(user)
    start = 0
    for users, width in blocks.shapes:
        rows = blocks.entries[start : start + users * width].view(users, width)
        assert (user[rows] == user[rows[:, :1]]).all()
        assert (place[rows][:, 1:] >= place[rows][:, :-1]).all()
        start += users * width


def test_one_block_for_all_gives_the_same() -> None:
    model, asked = transformer(), side([1, 20, 9, 0, 2, 16, 17])
    items = torch.randn(N_ITEMS, D, dtype=torch.float64)
    found = []
    for model.shortest in (0, 1, 8):
        found.append(model(items, asked))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_transformer_learns_what_follows_what() -> None:
    """In a world where item i + 1 follows item i, every position learns it in one pass."""
    torch.manual_seed(0)
    n, length = 12, 7
    model, table = CausalTransformer(16, length, hidden=32), torch.nn.Embedding(n, 16)
    out = torch.nn.Embedding(n, 16)
    optimiser = torch.optim.Adam(
        [*model.parameters(), *table.parameters(), *out.parameters()], lr=0.01
    )
    first = torch.arange(n)
    rows = (first[:, None] + torch.arange(length)) % n
    asked = UserSide(
        first, rows.reshape(-1), torch.full((n,), length), torch.zeros(n * length, 0).long(),
        at=torch.arange(n * length),
    )  # fmt: skip
    wanted = (rows.reshape(-1) + 1) % n
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(table.weight, asked) @ out.weight.T, wanted)
        loss.backward()
        optimiser.step()
    assert loss < 0.1
