"""The controller obeys its schedule, frees what it freezes, and goes on where it was."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from edgekit.adapters.aflora import AFLoraConfig, FreezeController, FreezePlan
from edgekit.adapters.plan import PLANS
from edgekit.adapters.projections import projections
from edgekit.errors import UsageError

Make = Callable[[], nn.Module]
STEPS, INTERVAL = 60, 4


def adapted(model: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(model, AFLoraConfig(r=2, delta_t=INTERVAL, **options))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: nn.Module,
    controller: FreezeController | None,
    ids: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    steps: range,
    seen: Callable[[int], None] = lambda step: None,
) -> None:
    for step in steps:
        model(input_ids=ids, labels=ids).loss.backward()
        if controller is not None:
            controller.step(step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        seen(step)


def test_the_rank_rule_meets_the_schedule(tiny_llama: Make, ids: torch.Tensor) -> None:
    model = adapted(tiny_llama())
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    total = len(controller.alive)
    assert total == 2 * 2 * 5  # A and B, layers, linears

    def check(step: int) -> None:
        if step % INTERVAL == 0 or step > controller.schedule.end:
            kept = controller.schedule.fraction(step)
            assert len(controller.alive) == total - math.floor((1 - kept) * total)

    train(model, controller, ids, optimizer, range(STEPS), check)
    assert not controller.alive
    assert controller.alive_fraction == 0.0
    assert sorted(f"{e.module}.{e.part}" for e in controller.log) == list(
        projections(model, "default")
    )
    assert all(event.step > controller.schedule.start for event in controller.log)


def test_what_is_frozen_never_moves_and_holds_nothing(tiny_llama: Make, ids: torch.Tensor) -> None:
    model = adapted(tiny_llama())
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    held: dict[str, torch.Tensor] = {}

    def check(step: int) -> None:
        for event in controller.log:
            name = f"{event.module}.{event.part}"
            parameter = projections(model, "default")[name].parameter
            before = held.setdefault(name, parameter.detach().clone())
            assert torch.equal(parameter, before)
            assert parameter.grad is None
            assert parameter not in optimizer.state
            assert not parameter.requires_grad

    train(model, controller, ids, optimizer, range(STEPS), check)
    assert len(held) == 20
    assert controller.nbytes == 0
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    vectors = [p for n, p in model.named_parameters() if "aflora_b" in n or "aflora_d" in n]
    assert all(p.requires_grad and p in optimizer.state for p in vectors)


def test_a_projection_is_not_moved_by_the_step_that_froze_it(
    tiny_llama: Make, ids: torch.Tensor
) -> None:
    model = adapted(tiny_llama(), t_init=2, t_final=20)
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    train(model, controller, ids, optimizer, range(INTERVAL))
    before = {n: p.parameter.detach().clone() for n, p in projections(model, "default").items()}
    train(model, controller, ids, optimizer, range(INTERVAL, INTERVAL + 1))
    frozen = {f"{event.module}.{event.part}" for event in controller.log}
    assert frozen
    for name, projection in projections(model, "default").items():
        assert torch.equal(before[name], projection.parameter) == (name in frozen)


def test_the_lowest_scores_freeze_first_ties_by_name(tiny_llama: Make) -> None:
    model = adapted(tiny_llama(), t_init=0, t_final=20)
    controller = FreezeController(model, total_steps=STEPS)
    names = controller.alive
    for place, name in enumerate(names):
        parameter = projections(model, "default")[name].parameter
        parameter.grad = torch.full_like(parameter, float(place // 2 + 1))
    controller.observe(0)
    count = len(controller.maybe_freeze(INTERVAL))
    assert 0 < count < len(names)
    assert [f"{e.module}.{e.part}" for e in controller.log] == names[:count]


def test_broken_gradients_are_not_counted(tiny_llama: Make) -> None:
    model = adapted(tiny_llama())
    controller = FreezeController(model, total_steps=STEPS)
    for projection in projections(model, "default").values():
        projection.parameter.grad = torch.full_like(projection.parameter, float("nan"))
    controller.observe(0)
    assert set(controller.scores.values()) == {0.0}


@pytest.mark.parametrize("rule", ["rank", "reference"])
@pytest.mark.parametrize("cadence", ["step", "window"])
@pytest.mark.parametrize("granularity", ["projection", "pair"])
def test_every_choice_ends_with_everything_frozen(
    tiny_llama: Make, ids: torch.Tensor, rule: str, cadence: str, granularity: str
) -> None:
    model = adapted(tiny_llama(), rule=rule, score_cadence=cadence, granularity=granularity)
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    train(model, controller, ids, optimizer, range(STEPS))
    assert not controller.alive
    steps = {}
    for event in controller.log:
        steps.setdefault(event.module, set()).add(event.step)
    if granularity == "pair":
        assert all(len(found) == 1 for found in steps.values())


def test_mean_trainable_is_the_mean_of_trainable(tiny_llama: Make, ids: torch.Tensor) -> None:
    model = adapted(tiny_llama())
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    counts: list[int] = []
    begin = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert controller.trainable() == begin
    train(model, controller, ids, optimizer, range(STEPS), lambda _: counts.append(now(model)))
    assert controller.trainable() == counts[-1]
    assert controller.mean_trainable() == pytest.approx(sum(counts) / STEPS)


def now(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_goes_on_from_its_state(tiny_llama: Make, ids: torch.Tensor) -> None:
    model = adapted(tiny_llama())
    controller, optimizer = FreezeController(model, total_steps=STEPS), optimizer_of(model)
    train(model, controller, ids, optimizer, range(STEPS))

    first = adapted(tiny_llama())
    before, moved = FreezeController(first, total_steps=STEPS), optimizer_of(first)
    train(first, before, ids, moved, range(25))
    second = adapted(tiny_llama())
    resumed = optimizer_of(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(moved.state_dict())
    after = FreezeController(second, total_steps=STEPS)
    after.load_state_dict(before.state_dict(), resumed)
    assert after.alive == before.alive
    train(second, after, ids, resumed, range(25, STEPS))
    assert [(e.step, e.module, e.part) for e in after.log] == [
        (e.step, e.module, e.part) for e in controller.log
    ]


def test_foreign_log_is_refused(tiny_llama: Make) -> None:
    controller = FreezeController(adapted(tiny_llama()), total_steps=STEPS)
    log = [{"step": 1, "module": "elsewhere", "part": "aflora_A", "score": 0.1}]
    with pytest.raises(UsageError, match=r"elsewhere\.aflora_A is not in this model"):
        controller.load_state_dict({"log": log, "scores": {}})


@pytest.mark.parametrize(
    ("plan", "start", "end"),
    [("ffa", {"lora_B"}, {"lora_B"}), ("lamda", {"lora_B"}, set()), ("always", set(), set())],
)
def test_other_methods_are_plans_over_lora(
    tiny_llama: Make, ids: torch.Tensor, plan: str, start: set[str], end: set[str]
) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    controller = FreezeController(model, total_steps=STEPS, plan=PLANS[plan])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert {name.rpartition(".")[2] for name in controller.alive} == start
    if start:
        model.base_model.model.lm_head.requires_grad_(True)  # stands for what LaMDA trains between
        train(model, controller, ids, optimizer, range(STEPS))
    assert {name.rpartition(".")[2] for name in controller.alive} == end


@pytest.mark.parametrize("order", ["random", "depth"])
def test_orders_to_compare_with(tiny_llama: Make, ids: torch.Tensor, order: str) -> None:
    logs = []
    for _ in range(2):
        model = adapted(tiny_llama())
        plan = FreezePlan(order=order, interval=INTERVAL)
        controller = FreezeController(model, total_steps=STEPS, plan=plan)
        train(model, controller, ids, optimizer_of(model), range(STEPS))
        logs.append([f"{event.module}.{event.part}" for event in controller.log])
    assert logs[0] == logs[1]
    layers = [int(name.split(".")[2]) for name in logs[0]]
    assert (layers == sorted(layers)) == (order == "depth")


def test_no_projections(tiny_llama: Make) -> None:
    with pytest.raises(UsageError, match="no projections in this model"):
        FreezeController(tiny_llama(), total_steps=STEPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule 'best' given; allowed: rank, reference"),
        ({"interval": 0}, "interval 0 given"),
        ({"beta1": 1.0}, "beta1 1.0 given"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FreezePlan(**changes)
