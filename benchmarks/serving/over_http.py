"""What HTTP costs above the engine: the same requests to the engine and through the server, from one connection, as JSON and as bytes.

python -m benchmarks.serving.over_http [--only demo] [--calls 200] [--out FILE.md]

Server, engine and client are in one process, the client on a thread of its own, so that both ways ask the same engine. Medians; answers are
compared with those of the engine first. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.serve import Engine, web
from benchmarks.serving import harness
from benchmarks.serving.harness import Bar, Case
from benchmarks.suite.report import table

MOST_ABOVE_S = 1e-3
"""Bar: what HTTP may add to the engine, as JSON and with the demo's model; with bytes it may add less."""

PATHS = {"predict": "infer", "adapt": "adapt", "adapt and predict": "infer"}


class Request(NamedTuple):
    """A request: its tensors by name, and the engine's method for the same."""

    tensors: dict[str, Tensor]
    ask: Callable[[], Coroutine[Any, Any, Any]]


def requests(case: Case, engine: Engine, tenant: str) -> dict[str, Request]:
    """Returns the requests by their names in `PATHS`."""
    support, inputs = case.supports[0], case.inputs
    of_support, of_query = {"support_0": support[0], "support_1": support[1]}, {"query_0": inputs}
    return {
        "predict": Request(of_query, lambda: engine.predict(tenant, inputs)),
        "adapt": Request(of_support, lambda: engine.adapt(tenant, support)),
        "adapt and predict": Request({**of_support, **of_query}, lambda: engine.adapt_predict(support, inputs)),
    }


def encoded(tensors: dict[str, Tensor], binary: bool) -> tuple[bytes, dict[str, str]]:
    """Returns the body of a request and its headers."""
    inputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, value in tensors.items():
        entry: dict[str, Any] = {"name": name, "shape": list(value.shape), "datatype": "FP32" if value.is_floating_point() else "INT64"}
        if binary:
            parts.append(value.numpy().tobytes())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = value.flatten().tolist()
        inputs.append(entry)
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": binary}}).encode()
    return b"".join([head, *parts]), {"Inference-Header-Content-Length": str(len(head))} if binary else {}


async def of_engine(ask: Callable[[], Coroutine[Any, Any, Any]], calls: int) -> float:
    """Returns the median seconds of a call of the engine, on its event loop."""
    taken: list[float] = []
    for _ in range(calls + calls // 10):
        began = time.perf_counter()
        await ask()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[calls // 10 :])


def of_server(connection: http.client.HTTPConnection, path: str, body: bytes, headers: dict[str, str], calls: int) -> float:
    """Returns the median seconds of a request."""
    taken: list[float] = []
    for _ in range(calls + calls // 10):
        began = time.perf_counter()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        taken.append(time.perf_counter() - began)
        assert answer.status == 200
    return statistics.median(taken[calls // 10 :])


def require_same_answer(connection: http.client.HTTPConnection, path: str, case: Case, found: Tensor) -> None:
    """Raises unless the server predicts what the engine does."""
    body, headers = encoded({"query_0": case.inputs}, binary=False)
    connection.request("POST", path, body, headers)
    (output,) = json.loads(connection.getresponse().read())["outputs"]
    torch.testing.assert_close(torch.tensor(output["data"]).reshape(output["shape"]), found)


def measure(case: Case, calls: int) -> list[list[float]]:
    """Returns for each request the median seconds through the engine, as JSON and as bytes."""
    made: list[Engine] = []

    def build() -> web.Built:
        example = case.supports[0], case.inputs
        made.append(Engine(case.unroll, example, lanes=(1,), keep=harness.KEEP))
        return web.Built(made[-1], example)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    is_ready = threading.Event()
    server = web.Server(build, web.Settings(name="model", port=port), ready=is_ready.set)
    thread = threading.Thread(target=server.run_until_stopped, daemon=True)
    thread.start()
    try:
        assert is_ready.wait(300)
        (engine,) = made
        assert engine.loop is not None
        connection = http.client.HTTPConnection("127.0.0.1", port)
        found = asyncio.run_coroutine_threadsafe(engine.predict("anyone", case.inputs), engine.loop).result()
        require_same_answer(connection, "/v2/models/model/infer", case, found)
        rows: list[list[float]] = []
        for name, request in requests(case, engine, "anyone").items():
            path = f"/v2/models/model/{PATHS[name]}"
            own = asyncio.run_coroutine_threadsafe(of_engine(request.ask, calls), engine.loop).result()
            rows.append([own, *[of_server(connection, path, *encoded(request.tensors, binary), calls) for binary in (False, True)]])
        connection.close()
        return rows
    finally:
        server.stop()
        thread.join(60)


def main() -> None:
    """Measures each model."""
    parser = harness.parser(__doc__)
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each request")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[str] = []
    for make in harness.chosen_cases(chosen.only):
        case = make(1, chosen.backend)
        rows = dict(zip(PATHS, measure(case, chosen.calls), strict=True))
        lines, bars = list[list[str]](), list[Bar]()
        for name, (own, text, binary) in rows.items():
            lines.append([name, *[f"{1e3 * value:.2f} ms" for value in (own, text, text - own, binary, binary - own)]])
            found = f"{1e3 * (text - own):.2f} ms; bytes {1e3 * (binary - own):.2f} ms"
            bars.append(Bar(f"{name}, above the engine", "at most 1 ms; bytes less", found, text - own <= MOST_ABOVE_S and binary < text))
        head = ["one connection, p50", "engine", "JSON", "above the engine", "bytes", "above the engine"]
        parts += [f"## {case.title}, {len(case.inputs)} examples to predict for", table(head, lines)]
        if make is harness.demo:
            parts.append(harness.bars(bars))
    harness.publish(harness.report("What HTTP costs above the engine", parts, f"; keep={harness.KEEP!r}, one lane"), chosen.out)


if __name__ == "__main__":
    main()
