"""Two processes that train one model (DDP over gloo): equal weights, and the mean of gradients."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import RULES, checkerboard, towers, trainer
from torch import Tensor

from recsys.towers import data as data_module
from recsys.towers.data import InteractionData
from recsys.towers.rules import MiningRules, TowerRules, TrainingRules
from recsys.towers.training import TwoTowerModule

lightning = pytest.importorskip("pytorch_lightning")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
WORLD = 2
PLANS = {
    "random": {"history": {"length": 5}},
    "in_time": {"history": {"kind": "mean", "length": 5}, "user_id": True},
    "by_user": {"history": {"kind": "mean", "table": "own", "length": 5}},
    "sequences": {"history": {"kind": "transformer", "hidden": 16, "length": 5}},
}


def parts(plan: str) -> tuple[TwoTowerModule, InteractionData]:
    """Towers without dropout, so that one process can make what each rank makes."""
    shape = PLANS[plan] | {"dropout": 0.0, "id_dropout": 0.0}
    rules = TrainingRules(
        **RULES.model_dump(exclude_unset=True)
        | {
            "batches": plan, "batch_size": 8 if plan in ("by_user", "sequences") else 16,
            "negatives": {"queue": 2, "uniform": 2}, "symmetric": 0.3,
            "temperature": "learned",
            "mined": MiningRules(per_query=2, from_rank=0, to_rank=12),
        }
    )  # fmt: skip
    events, validation = checkerboard(timed=rules.batches == "in_time")
    module = TwoTowerModule(towers(dimension=8, hidden=8, **shape), rules)
    settled = TowerRules(dimension=8, hidden=8, **shape)
    return module, InteractionData(events, validation, rules, towers=settled)


class Watch(lightning.Callback):
    """What the first backward pass left, before it is clipped, and the rows of each step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.sparse: list[str] = []
        self.users: list[list[int]] = []
        self.memory: dict[int, Tensor] = {}
        self.remembered: list[bool] = []

    def on_after_backward(self, trainer: Any, module: TwoTowerModule) -> None:
        if not self.found:
            named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
            self.sparse = [name for name, gradient in named if gradient.is_sparse]
            self.found = {name: gradient.detach().to_dense().clone() for name, gradient in named}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.users.append(batch.user.users.tolist())
        for row in batch.queued.tolist():
            self.remembered.append(torch.equal(module.memory_bank.vectors[row], self.memory[row]))

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        rows = batch.rows[: batch.n_candidates]
        self.memory |= dict(zip(rows.tolist(), module.memory_bank.read(rows)[0], strict=True))


def rank_trains(rank: int, folder: Path, port: int) -> None:
    """What each of the two processes does, one plan after the other."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    data_module.QUEUE_AFTER = 2
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD),
        "NODE_RANK": "0", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for plan in PLANS:
        (module, data), watch = parts(plan), Watch()
        # At every position of a history there is one: the vector of an empty one is never used.
        strategy = lightning.strategies.DDPStrategy(
            process_group_backend="gloo", find_unused_parameters=plan == "sequences"
        )
        running = trainer(2, watch, strategy=strategy, devices=WORLD)
        running.fit(module, data)
        left = {
            "steps": running.global_step, "share": data.batches.share.rank,
            "weights": {n: p.detach().cpu() for n, p in module.named_parameters()},
            "found": watch.found, "sparse": watch.sparse, "users": watch.users,
            "remembered": watch.remembered,
        }  # fmt: skip
        torch.save(left, folder / f"{plan}-{rank}.pt")
    # A process that ends first would take the other's connection with it.
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank left of every plan."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_trains, (folder, free_port()), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("plan", list(PLANS))
def test_two_ranks_end_with_equal_weights_and_step_by_the_mean_of_their_gradients(
    plan: str, trained: Path
) -> None:
    ranks = [torch.load(trained / f"{plan}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert [rank["share"] for rank in ranks] == [0, 1]

    # The same in one process: what each rank's own first batch gives, and the mean of the two.
    each: list[dict[str, Tensor]] = []
    for rank in range(WORLD):
        module, data = parts(plan)
        batches = data._make(rank, WORLD)
        batch = next(iter(batches))
        assert batch.user.users.tolist() == ranks[rank]["users"][0]
        module.batch_loss(batch).backward()
        named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
        each.append({name: gradient.to_dense() for name, gradient in named})
        assert ranks[rank]["steps"] == 2 * len(batches) == len(ranks[rank]["users"])
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    assert not torch.allclose(each[0]["temperature.log"], each[1]["temperature.log"])
    for rank in ranks:
        torch.testing.assert_close(rank["found"], mean, rtol=1e-4, atol=1e-6)
        assert "model.item_tower.inputs.ids.weight" in rank["sparse"]
        # What a rank has in its queue it has encoded itself.
        assert rank["remembered"] and all(rank["remembered"])
    weights = [rank["weights"] for rank in ranks]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = dict(parts(plan)[0].named_parameters())
    assert not [n for n in mean if mean[n].any() and torch.equal(weights[0][n], start[n])]


@pytest.mark.parametrize("plan", ["random", "by_user"])
def test_the_parts_of_the_ranks_are_the_whole(plan: str) -> None:
    users = [[], []]
    for rank in range(WORLD):
        batches = parts(plan)[1]._make(rank, WORLD)
        for batch in batches:
            users[rank] += batch.user.users.tolist()
    assert len(users[0]) == len(users[1])
    assert set(users[0]) | set(users[1]) == set(range(1, 41))
    if plan == "by_user":
        assert not set(users[0]) & set(users[1])
