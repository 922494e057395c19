"""The streaming estimate of draw probabilities against the truth and a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.frequency import StreamingFrequency, exact_shares
from recsys.features.prepared.timeline import Timeline


def zipf(n_items: int) -> np.ndarray:
    """Probabilities of items 1 … n; item 0 never comes."""
    share = np.append(0, 1 / np.arange(1, n_items))
    return share / share.sum()


def follow(
    frequency: StreamingFrequency, share: np.ndarray, draws: int, rng: np.random.Generator
) -> None:
    items = rng.choice(len(share), draws, p=share)
    for start in range(0, draws, 1000):
        part = items[start : start + 1000]
        frequency.update(part, np.arange(len(part)), len(part))


def error(frequency: StreamingFrequency, share: np.ndarray) -> float:
    """Mean absolute error of the log probability, items weighted by how often they come."""
    items = np.arange(1, len(share))
    return float(np.average(np.abs(np.log(frequency.share(items) / share[1:])), weights=share[1:]))


def test_on_a_zipf_stream_the_estimate_nears_the_truth_and_follows_a_change() -> None:
    rng, share = np.random.default_rng(0), zipf(500)
    frequency = StreamingFrequency(buckets=2**14, rate=0.02)
    follow(frequency, share, 5_000, rng)
    early = error(frequency, share)
    follow(frequency, share, 200_000, rng)
    assert error(frequency, share) < 0.1 < early
    # No bias: over items that came often, ratios average 1.
    common = np.arange(1, 60)
    assert np.mean(frequency.share(common) / share[common]) == pytest.approx(1, abs=0.05)
    changed = share.copy()
    changed[1:] = share[1:][::-1]
    assert error(frequency, changed) > 1
    follow(frequency, changed, 200_000, rng)
    assert error(frequency, changed) < 0.15


def test_what_comes_in_every_draw_or_never_yet() -> None:
    frequency = StreamingFrequency()
    assert frequency.share(np.array([3])).tolist() == [1]
    frequency.update(np.array([5, 5, 5, 5]), np.array([0, 1, 1, 2]), 3)
    assert frequency.share(np.array([5, 6])).tolist() == [1, 1 / 4]


def test_two_items_in_one_bucket_are_told_apart_by_another_hash_function() -> None:
    """Of few buckets, the largest gap over several hash functions is nearest to the truth."""
    share = zipf(100)
    errors = []
    for hashes in (1, 4):
        rng, frequency = np.random.default_rng(0), StreamingFrequency(buckets=150, hashes=hashes)
        follow(frequency, share, 100_000, rng)
        items = np.arange(1, 100)
        errors.append(np.abs(np.log(frequency.share(items) / share[1:])).mean())
    assert errors[1] < errors[0] / 2


@given(st.lists(st.lists(st.integers(1, 6), max_size=6), min_size=1, max_size=8))
@settings(max_examples=60)
def test_one_occurrence_a_block_is_the_moving_average_of_the_paper(
    blocks: list[list[int]],
) -> None:
    """With the first gaps averaged alike; blocks in which items do not repeat."""
    frequency = StreamingFrequency(buckets=2**20, hashes=1, rate=0.3)
    now, last, gap, seen = 0, dict[int, int](), dict[int, float](), dict[int, int]()
    for block in blocks:
        items = list(dict.fromkeys(block))
        for item in items:
            now += 1
            seen[item] = seen.get(item, 0) + 1
            rate = max(0.3, 1 / seen[item])
            gap[item] = (1 - rate) * gap.get(item, 0) + rate * (now - last.get(item, 0))
            last[item] = now
        frequency.update(np.array(items, np.int64), np.arange(len(items)), len(items))
    known = list(gap)
    wanted = [1 / max(gap[item], 1) for item in known]
    assert frequency.share(np.array(known, np.int64)).tolist() == pytest.approx(wanted)


def test_state_goes_on_and_another_size_is_refused() -> None:
    rng, share = np.random.default_rng(0), zipf(50)
    whole, first = StreamingFrequency(64, seed=3), StreamingFrequency(64, seed=3)
    items = rng.choice(50, 3000, p=share)
    for frequency in (whole, first):
        frequency.update(items[:2000], np.arange(2000), 2000)
    later = StreamingFrequency(64, seed=3)
    later.load_state_dict(first.state_dict())
    for frequency in (whole, later):
        frequency.update(items[2000:], np.arange(1000), 1000)
    assert np.array_equal(whole.share(np.arange(50)), later.share(np.arange(50)))
    with pytest.raises(ValueError, match="128 buckets, but 256"):
        StreamingFrequency(128).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="a rate in"):
        StreamingFrequency(rate=0)


def test_exact_shares_count_a_draw_once() -> None:
    assert exact_shares(np.array([1, 1, 2, 1]), 4).tolist() == [0, 0.75, 0.25, 0]
    shares = exact_shares(np.array([1, 1, 2, 1]), 4, np.array([7, 7, 7, 9]))
    assert shares.tolist() == [0, 1, 0.5, 0]


@pytest.mark.parametrize("plan", ["random", "by_user", "sequences"])
def test_batches_with_streaming_counts_come_near_the_exact_inclusion(plan: str) -> None:
    rng = np.random.default_rng(1)
    users = 300
    user = np.repeat(np.arange(1, users), 6)
    item = rng.choice(40, len(user), p=zipf(40)).astype(np.int32)
    timeline = Timeline.build(
        user, item, np.arange(len(user)), n_users=users, first_seen=np.zeros(40, np.int64)
    )
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, 40))
    exact, streaming = (
        Batches(events, plan=plan, batch_size=12, counts=counts, queue=1)  # type: ignore[arg-type]
        for counts in ("exact", "streaming")
    )
    gaps = []
    for _ in range(6):
        pairs = list(zip(exact, streaming, strict=True))
        gaps.append(
            torch.cat([(a.log_inclusion - b.log_inclusion).abs() for a, b in pairs]).mean().item()
        )
    assert gaps[-1] < 0.12
    assert gaps[-1] < gaps[0] / 2
