"""The joint step on real gloo ranks: tables stay sharded, one look-up is one update, ranks and stages do not matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.cluster.parallel import ParallelConfig
from jobs.training import placement as plan
from jobs.training.dense_engine import dense_engine
from jobs.training.dense_state import gather_dense_state, local_dense_state, restore_dense_state
from jobs.training.optimizers import OptimizerConfig
from jobs.training.placement import TablesDoNotFit
from jobs.training.tables import ShardedTables
from models.embeddings import ItemFeature, TableSpec, UserCodes, initial_rows
from tests.support.ranks import run_ranks

WIDTH, ITEMS, GENRES = 8, 128, 8
OPTIMIZER = OptimizerConfig(dense_lr=0.01, sparse_lr=0.1, warmup_steps=0, clip_norm=1.0)
ADAM = OptimizerConfig(dense_lr=0.01, sparse="adam", sparse_lr=0.01, warmup_steps=0, clip_norm=1.0)


def make_tables(optimizer: OptimizerConfig = OPTIMIZER) -> ShardedTables:
    lengths = torch.arange(ITEMS) % 3
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    feature = ItemFeature(name="genres", offsets=offsets, values=torch.arange(int(offsets[-1])) % GENRES)
    specs = [
        TableSpec(name="item", capacity=ITEMS, width=WIDTH),
        TableSpec(name="genres", capacity=GENRES, width=WIDTH),
    ]
    tables = ShardedTables(specs, [feature], optimizer=optimizer, device="cpu")
    tables.initialize(seed=1, std=0.1)
    return tables


def make_tower() -> nn.Module:
    torch.manual_seed(0)
    # 17 and 1 do not divide by 2 or 3 ranks: partitions are padded.
    return nn.Sequential(nn.Linear(2 * WIDTH, 17), nn.GELU(), nn.Linear(17, 1))


def step(tables: ShardedTables, engine, rows: Tensor, *, count: int, rate: float = OPTIMIZER.sparse_lr) -> float:
    tables.begin_step(rate)
    item_IC, features_IFC = tables.look_up(rows)
    logits = engine(torch.cat([item_IC, features_IFC[:, 0]], 1).to(next(engine.module.parameters()).dtype)).float()
    loss = (logits.squeeze(1) - rows / ITEMS).pow(2).sum()
    engine.backward(loss * (dist.get_world_size() / count))
    engine.step()
    tables.end_step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / count


def uneven_rows(step_number: int, rank: int, world_size: int) -> tuple[Tensor, int]:
    """The rows of a global batch, the first rank with most of them and the last with none in every third step."""
    everything = (torch.arange(40) * 7 + step_number * 11) % ITEMS
    if world_size == 1:
        return everything, 40
    cuts = torch.linspace(10, 40, world_size + 1).long()
    cuts[0] = 0
    if step_number % 3 == 0:
        cuts[-2] = 40
    return everything[cuts[rank] : cuts[rank + 1]], 40


def train(stage: int, precision: str, num_steps: int, optimizer: OptimizerConfig = OPTIMIZER) -> list[float]:
    tables = make_tables(optimizer)
    engine = dense_engine(
        make_tower(), optimizer=OPTIMIZER, parallel=ParallelConfig(zero_stage=stage, precision=precision)
    )
    losses = []
    for number in range(num_steps):
        rows, count = uneven_rows(number, dist.get_rank(), dist.get_world_size())
        losses.append(step(tables, engine, rows, count=count))
    return losses


def train_each(cases: list[tuple[int, str]]) -> list[list[float]]:
    """All cases in one set of processes: most of such a test is the time to import and connect."""
    return [train(stage, precision, 12) for stage, precision in cases]


@pytest.fixture(scope="module")
def losses_of_one_rank() -> list[float]:
    return run_ranks(train_each, 1, [(0, "fp32")])[0][0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_losses_do_not_depend_on_ranks_or_zero_stage(losses_of_one_rank, world_size):
    for losses in run_ranks(train_each, world_size, [(stage, "fp32") for stage in range(4)])[0]:
        # fp32 sums in another order: a few ulp a step, amplified by twelve updates.
        assert losses == pytest.approx(losses_of_one_rank, rel=1e-4)


def test_bf16_tower_follows_fp32_within_its_precision(losses_of_one_rank):
    for losses in run_ranks(train_each, 2, [(stage, "bf16") for stage in (1, 2, 3)])[0]:
        # bf16 has 8 bits of mantissa: 3e-2 is the bound of the project's contract.
        assert losses == pytest.approx(losses_of_one_rank, rel=3e-2)


def start_shards() -> list[tuple[str, int, Tensor]]:
    tables = make_tables()
    dense_engine(make_tower(), optimizer=OPTIMIZER, parallel=ParallelConfig(zero_stage=1))
    return [(shard.table, shard.first_row, shard.weight.clone()) for shard in tables.shards()]


def test_embedding_shards_differ_between_ranks_and_equal_the_seeded_rows():
    first, second = run_ranks(start_shards, 2)
    for (table, row, weight), (other_table, other_row, other_weight) in zip(first, second, strict=True):
        assert table == other_table
        assert row == 0
        assert other_row == weight.shape[0]
        assert not torch.equal(weight, other_weight)
        whole = initial_rows(table, seed=1, first=0, num_rows=2 * weight.shape[0], width=WIDTH, std=0.1)
        assert torch.equal(torch.cat([weight, other_weight]), whole)


def plan_on_a_small_machine() -> tuple[dict[str, Any], str]:
    """(the plan, what is said where rank 1's machine has 2,000 bytes left for both)."""
    described = make_tables().described_plan
    measured = plan.available_memory
    plan.available_memory = lambda: 2000 if dist.get_rank() == 1 else measured()
    try:
        make_tables()
    except TablesDoNotFit as error:
        return described, str(error)
    finally:
        plan.available_memory = measured
    raise AssertionError("planned")


def test_plan_is_made_of_what_machines_have_and_refuses_tables_that_do_not_fit():
    (described, said), (also, also_said) = run_ranks(plan_on_a_small_machine, 2)
    assert described == also
    assert said == also_said
    item, genres = described["tables"]
    assert (item["rows_per_worker"], item["kernel"], item["sharding"]) == ([64, 64], "fused", "row_wise")
    assert item["mib_per_worker"] == 64 * (WIDTH + 1) * 4 / 2**20
    assert genres["rows_per_worker"] == [4, 4]
    assert 0 < described["network_gib_per_second"] < described["memory_gib_per_second"] < 1000
    assert said.startswith("parallel.num_workers=2: the tables need 0.00 GiB per worker")


def learning_rate_of_tables() -> list[float]:
    """How far a row moves by the same gradient at two rates: (its first step, its first step at a tenth)."""
    moves = []
    for rate in (OPTIMIZER.sparse_lr, OPTIMIZER.sparse_lr / 10):
        tables = make_tables()
        tables.begin_step(rate)
        item_IC, _ = tables.look_up(torch.tensor([3]))
        before = item_IC.detach().clone()
        item_IC.sum().backward()
        moves.append((tables.look_up(torch.tensor([3]))[0].detach() - before).abs().mean().item())
    return moves


def test_scheduled_rate_reaches_the_fused_update():
    full, tenth = run_ranks(learning_rate_of_tables, 1)[0]
    assert full == pytest.approx(OPTIMIZER.sparse_lr, rel=1e-4)
    assert tenth == pytest.approx(full / 10, rel=1e-4)


def row_in_two_roles() -> tuple[Tensor, Tensor, Tensor]:
    """Item 70 as event and as candidate of one step: (its row before, after, the dense gradient)."""
    tables = make_tables()
    before = initial_rows("item", seed=1, first=70, num_rows=1, width=WIDTH, std=0.1)[0]
    rows = torch.tensor([70]) if dist.get_rank() == 0 else torch.tensor([], dtype=torch.int64)
    item_IC, _ = tables.look_up(rows)
    event, candidate = item_IC[torch.zeros(len(rows), dtype=torch.int64)], item_IC[: len(rows)]
    loss = (event * 3).sum() + candidate.pow(2).sum()
    (loss * dist.get_world_size()).backward()
    after = torch.zeros(WIDTH)
    for shard in tables.shards():
        if shard.table == "item" and shard.first_row <= 70 < shard.first_row + len(shard.weight):
            after = shard.weight[70 - shard.first_row].clone()
    dist.all_reduce(after)
    return before, after, 3 + 2 * before


def test_one_look_up_is_one_row_wise_adagrad_step_of_the_summed_gradient():
    before, after, gradient = run_ranks(row_in_two_roles, 2)[0]
    accumulator = gradient.pow(2).mean()
    expected = before - OPTIMIZER.sparse_lr * gradient / (accumulator.sqrt() + OPTIMIZER.sparse_eps)
    # One fp32 update; two look-ups would give two smaller ones, off by a third.
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def adam_beside_torch() -> tuple[list[Tensor], list[Tensor]]:
    """The item and genre rows after five uneven steps, and those of whole tables under torch.optim.Adam."""
    whole = [
        nn.Parameter(initial_rows(name, seed=1, first=0, num_rows=rows, width=WIDTH, std=0.1))
        for name, rows in (("item", ITEMS), ("genres", GENRES))
    ]
    torch_adam = torch.optim.Adam(whole, lr=ADAM.sparse_lr, betas=ADAM.betas, eps=ADAM.sparse_eps)
    tables = make_tables(ADAM)
    (feature,) = tables.features
    for number in range(5):
        everything, count = uneven_rows(number, 0, 1)
        mine, _ = uneven_rows(number, dist.get_rank(), dist.get_world_size())
        tables.begin_step(ADAM.sparse_lr)
        item_IC, features_IFC = tables.look_up(mine)
        (adam_loss(item_IC, features_IFC[:, 0]) * dist.get_world_size() / count).backward()
        tables.end_step()
        values, lengths = feature.of(everything)
        owner = torch.repeat_interleave(torch.arange(len(everything)), lengths)
        pooled = torch.zeros(len(everything), WIDTH).index_add(0, owner, whole[1][values])
        torch_adam.zero_grad()
        (adam_loss(whole[0][everything], pooled / lengths.clamp(min=1)[:, None]) / count).backward()
        torch_adam.step()
    ours = [torch.zeros(table.shape) for table in whole]
    for shard in tables.shards():
        place = ["item", "genres"].index(shard.table)
        ours[place][shard.first_row : shard.first_row + len(shard.weight)] = shard.weight
    for table in ours:
        dist.all_reduce(table)
    return ours, [table.detach() for table in whole]


def adam_loss(item_IC: Tensor, genre_IC: Tensor) -> Tensor:
    return (item_IC + genre_IC).pow(2).sum() + (3 * item_IC * genre_IC).sum()


@pytest.mark.parametrize("world_size", [1, 3])
def test_adam_of_tables_is_that_of_torch_at_any_world_size(world_size):
    for ours, theirs in run_ranks(adam_beside_torch, world_size):
        for table, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-6)


def interrupted(
    stage: int, precision: str, restored_stage: int, optimizer: OptimizerConfig = OPTIMIZER
) -> tuple[list[float], list[float]]:
    """Six steps in one go, and the last three again from the dense and sparse state after three."""
    parallel = ParallelConfig(zero_stage=stage, precision=precision)
    tables, engine = make_tables(optimizer), dense_engine(make_tower(), optimizer=OPTIMIZER, parallel=parallel)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for number in range(3):
        step(tables, engine, uneven_rows(number, rank, world_size)[0], count=40)
    dense = dict(gather_dense_state(local_dense_state(engine)))
    sparse = [clones(shard.tensors) for shard in tables.shards()]
    straight = [step(tables, engine, uneven_rows(number, rank, world_size)[0], count=40) for number in range(3, 6)]

    tower = make_tower()
    tower.load_state_dict({name: dense[name] for name, _ in tower.named_parameters()})
    again = dense_engine(
        tower, optimizer=OPTIMIZER, parallel=ParallelConfig(zero_stage=restored_stage, precision=precision)
    )
    restore_dense_state(again, dense, num_steps=3)
    for shard, before in zip(tables.shards(), sparse, strict=True):
        for name, tensor in shard.tensors.items():
            tensor.copy_(before[name])
    tables.restore_step(3)
    resumed = [step(tables, again, uneven_rows(number, rank, world_size)[0], count=40) for number in range(3, 6)]
    return straight, resumed


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def interrupt_each(cases: list[tuple]) -> list[tuple[list[float], list[float]]]:
    return [interrupted(*case) for case in cases]


def test_restored_state_continues_bit_equal():
    cases: list[tuple] = [(stage, "fp32", stage) for stage in range(4)]
    cases += [(stage, "bf16", stage) for stage in (1, 2, 3)]
    cases += [(1, "fp32", 1, ADAM)]
    for results in run_ranks(interrupt_each, 2, cases):
        for case, (straight, resumed) in zip(cases, results, strict=True):
            assert resumed == straight, case


def test_state_written_at_one_zero_stage_continues_at_another():
    for results in run_ranks(interrupt_each, 2, [(3, "fp32", 1), (0, "fp32", 3), (1, "fp32", 0)]):
        for straight, resumed in results:
            # Another stage sums gradients in another order.
            assert resumed == pytest.approx(straight, rel=1e-5)


def user_rows_after_a_step() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the user feature before and after a step with users on rank 0 alone; [U, G, C] of this rank."""
    specs = [TableSpec(name=name, capacity=ITEMS, width=WIDTH) for name in ("item", "user-city")]
    tables = ShardedTables(specs, [], user_tables=["user-city"], optimizer=OPTIMIZER, device="cpu")
    tables.initialize(seed=1, std=0.1)
    before = initial_rows("user-city", seed=1, first=0, num_rows=ITEMS, width=WIDTH, std=0.1)
    if dist.get_rank() == 0:
        # Value 100 lies on another rank; it is a value of two users, once beside another one.
        users = UserCodes(lengths_UG=torch.tensor([[1], [0], [2]]), values=torch.tensor([100, 100, 7]))
    else:
        users = UserCodes.of_nobody(1)
    assert tables.look_up(torch.tensor([5]))[0].shape == (1, WIDTH)
    _, _, users_UGC = tables.look_up_with_users(torch.zeros(0, dtype=torch.int64), users)
    (users_UGC * 3).sum().backward()
    looked_up = tables.look_up_with_users(
        torch.tensor([3]), UserCodes(lengths_UG=torch.ones(ITEMS, 1, dtype=torch.int64), values=torch.arange(ITEMS))
    )
    return before, looked_up[2][:, 0].detach(), users_UGC.detach()


def test_users_of_one_rank_update_each_value_once_and_a_rank_without_users_joins():
    (before, after, users_UGC), (_, same, nobody) = run_ranks(user_rows_after_a_step, 2)
    torch.testing.assert_close(users_UGC[:, 0], torch.stack([before[100], 0 * before[0], before[[100, 7]].mean(0)]))
    assert nobody.shape == (0, 1, WIDTH)
    assert torch.equal(after, same)
    moved = (after - before).abs().mean(1)
    # The first step of row-wise Adagrad moves a row by the learning rate however large its gradient: one update a row.
    expected = torch.zeros(ITEMS)
    expected[[7, 100]] = OPTIMIZER.sparse_lr
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)
