"""The goals on made-up results: value, verdict and cause follow from the numbers."""

from __future__ import annotations

import pytest

from deltaops.measure.causes import branch_floor
from deltaops.measure.cell import (
    EAGER,
    EMPTY_FUNCTION,
    FROZEN,
    MIXED,
    OURS,
    OURS_COMPILED,
    OWN_FROZEN,
    PEFT,
    PEFT_COMPILED,
    PREPACKED,
    ROUTED,
    Cell,
    Results,
)
from deltaops.measure.goals import GOALS, Outcome, evaluate
from deltaops.measure.interleave import Timing
from deltaops.measure.report import verdict

from .results import cell, results


def outcome(found: Results, goal: str, dtype: str = "f32") -> Outcome:
    (one,) = [o for o in evaluate(found) if (o.goal, o.dtype) == (goal, dtype)]
    return one


def test_every_goal_of_the_issue_is_there_once() -> None:
    ids = [g.id for g in GOALS]
    assert len(set(ids)) == len(ids)
    assert {d for g in GOALS for d in g.limits} == {"f32", "bf16"}


def test_without_cells_nothing_is_met_and_each_goal_says_why() -> None:
    for found in evaluate(results(peak="no probe")):
        assert found.met is None
        assert found.where in ("not part of this run", "no probe")


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.5, False)])
def test_a_speed_up_is_met_or_missed_by_its_worst_cell(ours: float, met: bool) -> None:
    found = results(
        cell("lora", {OURS: 1.0, PEFT: 9.0}, what="easy"),
        cell("lora", {OURS: ours, PEFT: 2.5}, what="hard"),
    )
    one = outcome(found, "lora-peft")
    assert (one.met, one.where, one.count) == (met, "hard f32", 2)
    assert one.worst == pytest.approx(2.5 / ours)
    assert bool(one.causes) is not met


def test_hidden_size_decides_which_overhead_goal_counts() -> None:
    small = cell("lora", {OURS: 1.2, OWN_FROZEN: 1.0}, what="1024×384×384", shape=(1024, 384, 384))
    found = results(small)
    assert outcome(found, "lora-own").met is None
    missed = outcome(found, "lora-own-384")
    assert missed.met is False
    assert "1.125" in missed.causes[1]  # 6·16·768 / (4·384²)
    assert branch_floor(small) == pytest.approx(1.125)


def test_beside_a_bf16_weight_the_factors_run_at_the_rate_of_float32() -> None:
    slow = cell("lora", {OURS: 1.3, OWN_FROZEN: 1.0}, what="1024×384×384", dtype="bf16",
                shape=(1024, 384, 384))  # fmt: skip
    found = results(slow, bf16_instructions=True)
    found.peak["bf16"] = 2 * 200.0
    assert "1.250 at that of float32" in outcome(found, "lora-own-384", "bf16").causes[1]


def test_dropout_is_compared_with_the_same_shape_without() -> None:
    found = results(
        cell("lora", {OURS: 1.0}),
        cell("lora", {OURS: 1.04}, dropout=0.1),
        cell("lora", {OURS: 9.0}, what="other"),
    )
    one = outcome(found, "lora-dropout")
    assert one.worst == pytest.approx(4.0)
    assert one.met is True


@pytest.mark.parametrize(("high", "overlap"), [(1.05, False), (1.3, True)])
def test_what_dropout_adds_is_told_and_whether_it_is_above_the_spread(
    high: float, overlap: bool
) -> None:
    base = cell("lora", {OURS: 1.0})
    base.timings[OURS] = Timing(1.0, 0.9, high, 9)
    one = outcome(results(base, cell("lora", {OURS: 1.2}, dropout=0.1)), "lora-dropout")
    assert one.met is False
    assert "dropout adds 200000 µs, for a seed and 512·768 elements" in one.causes[1]
    assert any("overlap" in cause for cause in one.causes) is overlap


def test_beside_prepacked_products_both_are_held_to_the_peak() -> None:
    half = 2e-9 * 512 * 768 * 768 / (0.5 * 200)
    one = outcome(results(cell("gemm", {OURS: half, PREPACKED: 0.8 * half})), "gemm-prepacked")
    assert one.causes[1:3] == [
        "deltaops reaches 50 % of the FMA peak", "oneDNN prepacked reaches 62 % of the FMA peak",
    ]  # fmt: skip


def test_the_product_is_held_to_the_peak_of_the_run() -> None:
    at_90_percent = 2e-9 * 512 * 768 * 768 / (0.9 * 200)
    found = results(cell("gemm", {OURS: at_90_percent, FROZEN: 2 * at_90_percent}))
    one = outcome(found, "gemm-peak")
    assert one.worst == pytest.approx(90)
    assert one.met is False
    assert "frozen eager reaches 45 % of the FMA peak" in one.causes


def test_a_goal_below_the_multiply_adds_is_beyond_any_kernel() -> None:
    found = results(cell("bitfit", {OURS: 0.02, EAGER: 0.01}))
    one = outcome(found, "bitfit")
    floor = 1e3 * 4e-9 * 512 * 768 * 768 / 200
    assert one.causes[0] == (
        f"the goal asks for 5 ms, and the multiply-adds alone take {floor:.3g} ms at the FMA peak: "
        "no kernel of this machine reaches it; ours takes 20 ms"
    )


def test_where_the_multiply_adds_leave_room_the_parts_over_them_are_told() -> None:
    at_peak = 4e-9 * 512 * 768 * 768 / 200
    branch = 6e-9 * 512 * 16 * 1536 / 200
    seconds = {OURS: 1.2 * at_peak + branch, PEFT: 2.2 * (1.1 * at_peak + branch)}
    found = results(cell("lora", seconds | {OWN_FROZEN: 1.15 * at_peak}))
    (said, *_) = outcome(found, "lora-peft").causes
    assert said == (
        f"the goal asks for {1e3 * (1.1 * at_peak + branch):.3g} ms; "
        f"of {1e3 * seconds[OURS]:.3g} ms the multiply-adds take {1e3 * (at_peak + branch):.3g} ms "
        f"at the FMA peak, our frozen layer {150 * at_peak:.3g} ms more than its own, "
        f"the delta {50 * at_peak:.3g} ms more than its own"
    )


def test_a_step_is_held_to_the_products_of_the_frozen_base() -> None:
    step = cell("step", {OURS: 1.0, PEFT: 1.5}, what="BERT", shape=None, flops=0.9 * 200e9)
    assert outcome(results(step), "step-peft-bert").causes[0] == (
        "the goal asks for 714 ms, and the multiply-adds of the frozen base alone take 900 ms at "
        "the FMA peak: no kernel of this machine reaches it; ours takes 1e+03 ms"
    )


def test_a_mixed_batch_tells_the_routing_from_the_other_adapters() -> None:
    found = results(cell("mixed", {OURS: 1.0, ROUTED: 1.1, MIXED: 1.32}))
    assert any(
        "one of the eight take 1.10×" in c and "takes 1.20× of that" in c
        for c in outcome(found, "mixed").causes
    )


def test_a_small_call_is_held_to_a_function_that_computes_nothing() -> None:
    seconds = {OURS: 44e-6, FROZEN: 20e-6, EMPTY_FUNCTION: 31e-6}
    one = outcome(results(cell("call", seconds, what="4×16×16", shape=None)), "call")
    assert "computes nothing takes 31.0 of our 44.0 µs, F.linear 20.0" in one.causes[0]
    del seconds[EMPTY_FUNCTION]
    one = outcome(results(cell("call", seconds, what="4×16×16", shape=None)), "call")
    assert "of our 44.0 µs 24.0 are beyond F.linear's 20.0" in one.causes[0]


def test_small_products_are_not_held_to_the_peak() -> None:
    found = results(cell("gemm", {OURS: 1.0}, shape=(16, 2048, 2048)))
    assert outcome(found, "gemm-peak").met is None


def test_the_better_of_ours_meets_compiled_peft() -> None:
    seconds = {OURS: 2.0, OURS_COMPILED: 1.0, PEFT_COMPILED: 1.7}
    one = outcome(results(cell("step", seconds, what="BERT", shape=None)), "step-compiled")
    assert one.worst == pytest.approx(1.7)


def test_adapters_of_both_kinds_count() -> None:
    found = results(
        cell("parallel", {OURS: 1.0, EAGER: 3.0}), cell("sequential", {OURS: 1.0, EAGER: 1.9})
    )
    one = outcome(found, "adapter-layers")
    assert (one.met, one.count) == (False, 2)
    assert one.where.startswith("sequential")


def test_saved_bytes_are_counted_above_the_branch_state() -> None:
    state = 4 * 512 * 16
    assert outcome(results(cell("lora", {OURS: 1.0}, saved={OURS: state + 8})), "saved").worst == 8
    kept_mask = outcome(results(cell("lora", {OURS: 1.0}, saved={OURS: 3 * state})), "saved")
    assert kept_mask.met is False
    assert any(f"{3 * state} bytes" in c for c in kept_mask.causes)


def test_every_method_that_is_slower_is_named_with_what_the_profiler_saw() -> None:
    def on(name: str, ours: float, note: str = "") -> Cell:
        return cell("method", {OURS: ours, EAGER: 1.0}, what=name, model="BERT", note=note)

    found = results(on("LoRA", 0.5), on("Prefix", 1.25, "aten::a"), on("BitFit", 2.0, "aten::b"))
    one = outcome(found, "method-eager")
    assert (one.met, one.where, one.worst) == (False, "BitFit on BERT f32", 0.5)
    assert one.causes[:2] == ["BitFit on BERT: 0.50×, aten::b", "Prefix on BERT: 0.80×, aten::a"]
    assert outcome(results(on("LoRA", 1.0)), "method-eager").met is True


def test_the_methods_goal_is_open_while_one_has_no_ratio() -> None:
    def on(name: str, **fields: object) -> Cell:
        return cell("method", {OURS: 0.5, EAGER: 1.0}, what=name, model="BERT", **fields)

    alone = cell("method", {OURS: 1.0}, what="Odd", model="BERT", absent={EAGER: "no form"})
    impossible = cell("method", {}, what="Prompt", model="BERT", absent={OURS: "no room"})
    found = results(on("LoRA"), alone, impossible)
    found.failed.update({"method IA3 on BERT f32": "off", "method IA3 on BERT bf16": "narrow"})
    found.left_out["method BitFit on BERT f32"] = "no time"
    one = outcome(found, "method-eager")
    assert (one.met, one.worst) == (None, 2.0)
    assert "of 4 methods, 3 without a peer: IA3 on BERT f32: off; BitFit on BERT f32" in one.where
    assert "Odd on BERT f32: no form" in one.where
    assert "Prompt" not in one.where
    assert verdict(one) == "incomplete"
    assert outcome(found, "method-eager", "bf16").where == "narrow"
    found.cells.append(cell("method", {OURS: 2.0, EAGER: 1.0}, what="DoRA", model="BERT"))
    assert outcome(found, "method-eager").met is False


def test_a_missing_peer_is_the_reason_of_an_empty_cell() -> None:
    found = results(cell("lora", {OURS: 1.0}, absent={PREPACKED: "needs AVX-512"}))
    one = outcome(found, "lora-prepacked")
    assert one.met is None
    assert "needs AVX-512" in one.where


def test_a_miss_in_bf16_names_the_missing_instructions() -> None:
    slow = cell("bitfit", {OURS: 2.0, EAGER: 1.0}, dtype="bf16")
    assert "no BF16 instructions" in outcome(results(slow), "bitfit", "bf16").causes[0]
    with_them = outcome(results(slow, bf16_instructions=True), "bitfit", "bf16")
    assert not any("BF16" in c for c in with_them.causes)


def test_torch_near_the_peak_is_named_as_the_ceiling() -> None:
    at_peak = 4e-9 * 512 * 768 * 768 / 200
    one = outcome(results(cell("lora", {OURS: at_peak, FROZEN: at_peak / 0.8})), "lora-frozen")
    assert one.met is False
    assert any("80 % of the FMA peak" in c for c in one.causes)
