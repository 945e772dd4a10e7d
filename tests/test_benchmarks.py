"""The benchmark suite: contestants compute the same before they are timed, and reports say what was measured."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrt.serve import Engine, SQLiteStore
from benchmarks import distributed, launches, rewrites, time_and_memory
from benchmarks.parts import PARTS
from benchmarks.serving import apps, harness, load, peers, tenants
from benchmarks.suite import bench_latency
from benchmarks.suite import contest as contests
from benchmarks.suite.contest import TOLERANCE, WrongNumbers, by_turns, contest
from benchmarks.suite.contestants import ENTRANTS, Entrant, loop
from benchmarks.suite.playback import Playback
from benchmarks.suite.report import adjoints_table, bars_table, by_key, latency_table
from benchmarks.suite.workloads import WORKLOADS, sequences

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing `higher`
WITHOUT_COMPILER = ("eager loop", "torch.func", "higher", "adaptrt, eager backend")


@pytest.mark.parametrize("workload", ["sine", "sine-tasks", "adapters", "lstm"])
def test_contestants_agree_with_the_oracle(workload: str) -> None:
    smaller = {"data": sequences(3, 16), "support": 5, "query": 5} if workload == "lstm" else {}
    found = contest(WORKLOADS[workload]._replace(calls=3, k=2, **smaller), WITHOUT_COMPILER)
    names = set(WITHOUT_COMPILER) - ({"higher"} if workload == "sine-tasks" else set())
    assert {quantity: set(results) for quantity, results in found.items()} == dict.fromkeys(("adapt", "predict", "meta"), names)
    for result in (result for results in found.values() for result in results.values()):
        assert result.error < TOLERANCE
        assert len(result.times_s) == 3 and min(result.times_s) > 0


def test_adam_has_two_forms() -> None:
    workload = WORKLOADS["adapters"]._replace(optimizer="adam", numbers={"lr": 0.01, "eps": 0.01}, calls=3)
    contest(workload, ("eager loop", "higher", "adaptrt, eager backend"), ("meta",))


def at_another_rate(times: float) -> Callable[..., Any]:
    """A contestant that computes something else: its learning rate is so many times the workload's."""
    return lambda workload, dtype: loop(workload._replace(numbers={"lr": times * workload.numbers["lr"]}), dtype)


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENTRANTS, "other", Entrant(at_another_rate(1.001)))
    monkeypatch.setattr(contests, "by_turns", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(WrongNumbers, match=r"adapters, meta: other is off by .*e-0\d in float32"):
        contest(WORKLOADS["adapters"], ("eager loop", "other"), ("meta",))


def test_who_is_wrong_is_sent_off_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENTRANTS, "other", Entrant(at_another_rate(2)))
    found, sent_off = bench_latency.results("adapters", ("other", "eager loop"), ("meta",), 0.01, "cpu")
    assert list(found["meta"]) == ["eager loop"] and "other is off by" in str(sent_off["other"])


def test_mixed_precision_is_held_against_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["adapters"]._replace(name="another", calls=3)
    found = contest(workload, ("eager loop", "eager loop, bfloat16"), ("meta",))["meta"]
    assert found["eager loop"].error < TOLERANCE < 1e-4 < found["eager loop, bfloat16"].error

    monkeypatch.setitem(ENTRANTS, "other", Entrant(at_another_rate(8), in_bfloat16=True))
    with pytest.raises(WrongNumbers, match=r"another, meta: other is off by .* where autocast is by"):
        contest(workload, ("eager loop", "other"), ("meta",))


def test_adjoints_are_compared_with_the_best() -> None:
    def row(workload: str, adjoint: str, longer: float) -> dict[str, Any]:
        return {
            "extra_info": {"workload": workload, "adjoint_of": adjoint, "times_longer": longer},
            "stats": {"median": longer / 1000},
        }

    rows = [row("lstm", "auto", 1.0), row("lstm", "Stash()", 0.8), row("lstm", "Replay()", 2.0), row("sine", "auto", 1.0)]
    assert adjoints_table(rows).splitlines()[2:] == [
        "| lstm | 1.00 ms | 800 µs | 2.00 ms | 1.25 |",
        "| sine | 1.00 ms |  |  | 1.00 |",
    ]


def test_launches() -> None:
    assert launches.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert launches.percentile(list(range(1, 101)), 99) == 99
    good, bad = (launches.Row("sine", "meta", 1e-7, 1e-4, p99, 1000, count, 10**6) for p99, count in ((1.04e-4, 1), (1.2e-4, 2)))
    assert not good.missed()
    assert len(bad.missed()) == 2 and "2 graph launches, the bar 1" in bad.missed()[1]
    text = launches.markdown([good, bad], "the command", "cpu")
    assert "| sine | meta | 100 µs | 104 µs | 1.04 | 1000 | 1 | 1.0 MB | 1e-07 |" in text and text.count("**missed**") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_for_gpus_says_what_it_lacks() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    done = subprocess.run(
        ["bash", script], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1 and "no CUDA device was found" in done.stderr


def test_turns() -> None:
    order: list[str] = []
    times = by_turns({name: lambda name=name: order.append(name) for name in "ab"}, count=2, warm_up=1)
    assert order == list("ababab")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_playback() -> None:
    clock = Playback()
    clock.load([0.5, 0.25])
    looks = [clock() for _ in range(4)]
    assert [looks[1] - looks[0], looks[3] - looks[2]] == [0.5, 0.25]


def test_tables() -> None:
    def row(name: str, median: float, **longer: float) -> dict[str, Any]:
        info = {"workload": "sine", "quantity": "adapt", "contestant": name, "error": 2e-7, "first_call_s": 1.0, "times_longer": longer}
        return {"extra_info": info, "stats": {"median": median}}

    rows = by_key([row("adaptrt", 2e-5, **{"eager loop": 26.0, "JAX jit + optax": 1.2}), row("eager loop", 5.2e-4, adaptrt=0.04)])
    assert "| eager loop | 520 µs | 26.00 |" in latency_table("sine", rows)
    assert bars_table(rows).splitlines()[2:] == [
        "| sine | adapt | eager loop | 25 | 26.00 | reached |",
        "| sine | adapt | JAX jit + optax | 1.5 | 1.20 | **missed** |",
    ]


def test_a_rewrite_is_measured_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "SECONDS", 0.0)
    (part,) = PARTS["GELU by a sigmoid"]
    row = rewrites.on_a_part("GELU by a sigmoid", part)
    assert len(row.with_s) == len(row.without_s) == 10 and row.error < rewrites.TOLERANCE
    text = rewrites.markdown([row._replace(with_s=[1e-5, 1e-5], without_s=[2e-5, 3e-5], error=1e-7)], "the command")
    assert "| GELU by a sigmoid | pullback of 512×512 | 25 µs | 10 µs | 2.50 | 1e-07 | yes |" in text

    monkeypatch.setattr(rewrites, "timed", lambda *args: pytest.fail("it was timed"))
    monkeypatch.setattr(rewrites, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"with GELU by a sigmoid: the program is off by .* nothing was timed"):
        rewrites.on_a_part("GELU by a sigmoid", part)


def test_every_rewrite_can_be_switched_and_has_a_part_that_it_is_measured_on() -> None:
    for rewrite in rewrites.REWRITES.values():
        with rewrite.off(), rewrite.on():
            pass
    of_whole_unrolls = {"tasks one by one", "what steps share computed once"}
    assert set(rewrites.REWRITES) - set(PARTS) == of_whole_unrolls and not of_whole_unrolls & set(PARTS)


def test_time_and_memory_of_a_line(tmp_path: Path) -> None:
    rows = time_and_memory.rows_of("sine", "Replay()", [1, 5])
    assert [row["k"] for row in rows] == [1, 5]
    assert rows[1]["peak_bytes"] > rows[0]["peak_bytes"] > 0 and all(row["time_s"] > 0 and row["error"] < TOLERANCE for row in rows)
    rows.append({"workload": "sine", "line": "higher", "k": 1, "out_of_memory": True})
    text = time_and_memory.markdown(rows, "the command")
    assert "the command" in text and "| higher | over 16 GB |" in text and text.count(" MB") == 2
    if importlib.util.find_spec("matplotlib") is not None:
        time_and_memory.figure(rows, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000


def test_report_of_one_process_and_two(tmp_path: Path) -> None:
    times = {"1 process": [0.02, 0.04, 0.02], "1 process, 2 threads": [0.02, 0.02, 0.02], "2 processes": [0.0125, 0.025, 0.0125]}
    sizes = {"error": 1e-7, "error_in_float64": 1e-15, "eager_error": 2e-7, "k": 5, "bytes": 7000, "num_tasks": 32, "iteration_s": 0.0125}
    row = {"case": "sine, 32 tasks", "times_s": times, **sizes, "all_reduce_share": 0.3, "sending_share": 0.1}
    text = distributed.markdown([row], "the command")
    assert "the command" in text and "| 1,600 (1.00 ×) | 1,600 (1.00 ×) | 2,560 (1.60 ×) |" in text
    assert "| 12.5 ms | 7 kB | 70.0% | 20.0% | 10.0% |" in text
    if importlib.util.find_spec("matplotlib") is not None:
        distributed.save([row], tmp_path / "report", "the command")
        assert (tmp_path / "report.png").stat().st_size > 1000


def test_averaged_gradients_are_compared_before_anything_is_timed() -> None:
    problem = distributed.CASES["sine, 32 tasks"].problem()._replace(num_tasks=2, k=1)

    def right(dtype: torch.dtype) -> list[torch.Tensor]:
        return list(loop(problem, dtype)["meta"]())

    found = distributed.gate(problem, right, checks=True)
    assert found["error_in_float64"] == 0 < found["error"] == found["eager_error"] < TOLERANCE
    with pytest.raises(RuntimeError, match="nothing was timed"):
        distributed.gate(problem, lambda dtype: [1.001 * value for value in right(dtype)], checks=True)


@pytest.mark.slow
def test_two_processes_are_measured() -> None:
    (row,) = distributed.rows_of(["sine, 32 tasks"], rounds=2, turn_s=0.05, backend="eager")
    assert row["error"] < TOLERANCE and row["bytes"] == 4 * 1761
    assert set(row["times_s"]) == set(distributed.CONTESTANTS) and all(
        len(times) == 2 and min(times) > 0 for times in row["times_s"].values()
    )
    assert 0 < row["sending_share"] <= row["all_reduce_share"] < 1


def test_arrivals_and_bars_of_serving() -> None:
    times = harness.poisson(100.0, 10.0, seed=0)
    assert times == sorted(times) == harness.poisson(100.0, 10.0, seed=0) and 800 < len(times) < 1200 and times[-1] < 10.0
    text = harness.report("a title", [harness.bars([harness.Bar("p99", "at most 1", "2", False)])], "; some details")
    assert text.startswith("# a title\n\nMade by `python") and "; some details." in text and "| p99 | at most 1 | 2 | **missed** |" in text


def test_open_load_on_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LOADS", [(0.5, "none", None), (2.0, "short deadlines", 6)])
    case = harness.sine(4, backend="eager")
    found = harness.run(load.measure(case, 0.3))
    assert [row.times for row in found.rows] == [0.5, 2.0]
    for row in found.rows:
        assert sum(row.offered.counts.values()) == len(row.offered.late_s) > 0 and row.longest <= load.MAX_QUEUE
    assert not set(found.rows[0].offered.counts) - {"answered", "overloaded"}
    title, words, loads, bars = load.markdown(case, found)
    assert "sine" in title and "| 2 × |" in loads and "lanes alone takes" in words and "goodput at 2 × capacity" in bars


def test_an_engine_that_miscounts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "offer", lambda *args: asyncio.sleep(0, load.Offered(1.0, 1.0, [], [], Counter(answered=1), 0.0)))

    async def test() -> None:
        case = harness.sine(2, backend="eager")
        async with Engine(case.unroll, (case.supports[0], case.inputs), lanes=(1,)) as engine:
            await load.row(case, engine, load.Capacity(1.0, 1.0), 1.0, "none", None, 0.1)

    with pytest.raises(RuntimeError, match=r"callers count .*'answered': 1.*, the engine"):
        harness.run(test())


def test_tenants_through_few_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "NUM_LANES", 2)
    monkeypatch.setattr(tenants, "CALLERS", 2)
    found = tenants.measure(6, 2, 1.5, "eager")
    assert found.num_equal == sum(count > 0 for count in found.counts) > 0 and found.most_cached <= 4 and found.largest < 1e-5
    table, bars = tenants.markdown(found, 2)
    assert "adaptations" in table and "states equal bit for bit" in bars
    if importlib.util.find_spec("matplotlib") is not None:
        tenants.figure(found, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000

    people = tenants.population(1, "eager")
    with pytest.raises(AssertionError, match="tenant 0 has a record: False, adaptations: 1"):
        store = SQLiteStore(tmp_path / "empty.db")
        try:
            tenants.compare(people, store, {}, [1])
        finally:
            store.close()


def test_servers_are_asked_for_the_same(tmp_path: Path) -> None:
    case = harness.sine(2, backend="eager")
    with torch.inference_mode():
        expected = case.unroll.adapt(case.supports[1])(case.inputs)
    for peer in peers.PEERS.values():
        head, _, body = peers.request(peer, case, 1, "a-key").partition(b"\r\n\r\n")
        assert f"POST {peer.path} HTTP/1.1".encode() in head and (b"Bearer a-key" in head) == peer.has_keys
        named = apps.tensors_of(json.loads(body))
        answer = apps.answer_of(apps.adapted(case, (named["support_0"], named["support_1"]), named["query_0"]))
        torch.testing.assert_close(peers.outputs(json.dumps(answer).encode()), expected, rtol=1e-4, atol=1e-5)

    rate = peers.Rate(200.0, 1e-3, 2e-3, 0.1)
    found = {
        name: peers.Found(1e-7, {n: [rate, rate._replace(per_s=100.0 * (1 + (name == "ours")))] for n in (1, 8, 32)})
        for name in peers.PEERS
    }
    _, rates = peers.markdown(case.title, found)
    assert "| 8 | LitServe, eager loop, batches of 32 | 150 | 1.33 | 1.00 ms | 2.00 ms | 10% | 1e-07 |" in rates


@pytest.mark.slow
def test_a_server_in_a_process_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    case = harness.sine(2, backend="eager")
    with peers.server("fastapi", "sine", tmp_path / "keys") as (port, process):
        found = harness.run(peers.measure_one(port, process, "fastapi", case, [""] * 32, 0.1))
    assert found.error < 1e-4 and set(found.rates) == set(peers.CONNECTIONS) and process.poll() is not None
