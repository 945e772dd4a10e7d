"""The engine behind HTTP beside LitServe and FastAPI around an eager loop: requests a second, and latencies.

    python -m benchmarks.serving.peers [--only sine] [--seconds 5] [--rounds 3] [--out FILE.md]

A request brings support data and inputs, and gets predictions after five steps; nothing is kept. Its body is the same for all servers,
which `benchmarks/serving/apps.py` holds. Each is a process of its own on the loopback interface, and ends before the next one starts; the
servers take turns, and medians over the rounds are shown. Answers are compared with the eager loop before anything is timed.

Load is a closed loop of 1, 8 and 32 connections, each of which sends its next request when it has the answer. The client is a process of
its own, sends bytes that were made before, and reads of an answer its status and its length; "client" is the share of the time in which it
ran. It runs on the same processor, and so do all processes of a server: FastAPI has one, ours has one, LitServe has one for HTTP and one
that computes.

Needs the extras `bench` and `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.serving import harness
from benchmarks.serving.apps import MODEL, adapted
from benchmarks.serving.harness import CASES, Case, percentile
from benchmarks.suite.report import shown_time, table

CONNECTIONS = (1, 8, 32)
START_S, STOP_S = 300.0, 20.0
PATIENCE_S = 60.0
"""For answers that a server owes; longer is taken for never."""

OURS = "ours"


class Peer(NamedTuple):
    """How a server is asked.

    Attributes:
      title: what reports call it.
      path: of the address.
      has_keys: whether a request brings a key.
    """

    title: str
    path: str
    has_keys: bool = False


PEERS = {
    OURS: Peer("adaptrt.serve, batches of 32", f"/v2/models/{MODEL}/infer", has_keys=True),
    "litserve": Peer("LitServe, eager loop, batches of 32", "/infer"),
    "fastapi": Peer("FastAPI, eager loop, thread pool", "/infer"),
}
DATATYPES = {torch.float32: "FP32", torch.int64: "INT64"}


def request(peer: Peer, case: Case, index: int, key: str) -> bytes:
    """Returns a request for the support data of this index, with all of HTTP."""
    x, y = case.supports[index % len(case.supports)]
    named = {"support_0": x, "support_1": y, "query_0": case.inputs}
    inputs = [
        {"name": name, "shape": list(value.shape), "datatype": DATATYPES[value.dtype], "data": value.flatten().tolist()}
        for name, value in named.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    lines = [f"POST {peer.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    if peer.has_keys:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def outputs(answer: bytes) -> Tensor:
    """Returns the predictions in the body of an answer."""
    entry = next(entry for entry in json.loads(answer)["outputs"] if entry["name"].startswith("output"))
    return torch.tensor(entry["data"]).reshape(entry["shape"])


class Connection:
    """A connection that sends requests one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def to(port: int) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, data: bytes) -> bytes:
        """Sends a request, and returns the body of its answer.

        Raises:
          RuntimeError: the answer is no success.
        """
        self._writer.write(data)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{head.splitlines()[0].decode()}: {body[:300].decode(errors='replace')}")
        return body

    def close(self) -> None:
        self._writer.close()


class Rate(NamedTuple):
    """What a load found: requests a second, latencies in seconds, and the share of time in which the client ran."""

    per_s: float
    p50_s: float
    p99_s: float
    client: float


async def load(port: int, requests: Sequence[bytes], num_connections: int, seconds: float) -> Rate:
    """Loads a server; each connection has a request of its own, and so a key."""
    connections = [await Connection.to(port) for _ in range(num_connections)]
    times_s: list[float] = []

    async def one(connection: Connection, data: bytes, ends: float, notes: bool) -> None:
        while (began := time.perf_counter()) < ends:
            await connection.ask(data)
            if notes:
                times_s.append(time.perf_counter() - began)

    async def all_of_them(seconds: float, notes: bool) -> float:
        began = time.perf_counter()
        await asyncio.gather(*[one(*pair, began + seconds, notes) for pair in zip(connections, requests[:num_connections], strict=True)])
        return time.perf_counter() - began

    async with asyncio.timeout(2 * seconds + PATIENCE_S):
        await all_of_them(seconds / 5, False)
        cpu_began = time.process_time()
        passed = await all_of_them(seconds, True)
    client = (time.process_time() - cpu_began) / passed
    for connection in connections:
        connection.close()
    return Rate(len(times_s) / passed, percentile(times_s, 50), percentile(times_s, 99), client)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def server(name: str, case: str, keys: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Runs a server, and returns its port and process. At the end it is stopped, with all processes that it started."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving.apps", name, case, str(port)]
    if PEERS[name].has_keys:
        command.append(str(keys))
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield port, process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session is the server's own
        process.wait()


async def is_ready(port: int, process: subprocess.Popen[bytes], data: bytes) -> None:
    """Waits until a server answers.

    Raises:
      RuntimeError, OSError: it has ended, or does not answer for long.
    """
    ends = time.monotonic() + START_S
    while True:
        try:
            connection = await Connection.to(port)
            try:
                await connection.ask(data)
                return
            finally:
                connection.close()
        except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
            if isinstance(error, RuntimeError) and "503" not in str(error):
                raise  # it is there, and does not understand the request
            if time.monotonic() > ends or process.poll() is not None:
                raise
            await asyncio.sleep(0.25)


async def require_right_numbers(port: int, case: Case, requests: Sequence[bytes]) -> float:
    """Asks for predictions of all supports at once, and returns the largest difference from the eager loop.

    Raises:
      AssertionError: it is more than rounding.
    """

    async def one(data: bytes) -> Tensor:
        connection = await Connection.to(port)
        try:
            return outputs(await connection.ask(data))
        finally:
            connection.close()

    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*[one(data) for data in requests])
    largest = 0.0
    for index, value in enumerate(found):
        expected = adapted(case, case.supports[index % len(case.supports)], case.inputs)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
        largest = max(largest, (value - expected).abs().max().item())
    return largest


class Found(NamedTuple):
    """What was measured of one server: the largest difference from the eager loop, and rates by connections, one for each round."""

    error: float
    rates: dict[int, list[Rate]]


async def measure_one(port: int, process: subprocess.Popen[bytes], name: str, case: Case, keys: Sequence[str], seconds: float) -> Found:
    """Checks and loads a server that runs."""
    requests = [request(PEERS[name], case, index, key) for index, key in enumerate(keys)]
    await is_ready(port, process, requests[0])
    error = await require_right_numbers(port, case, requests)
    return Found(error, {number: [await load(port, requests, number, seconds)] for number in CONNECTIONS})


def measure(name_of_case: str, names: Sequence[str], seconds: float, rounds: int) -> dict[str, Found]:
    """Starts servers by turns, and loads each."""
    from adaptrt.serve.web import add_key

    case = CASES[name_of_case](backend="eager")
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        keys = [add_key(path, f"tenant-{index}") for index in range(max(CONNECTIONS))]
        for _ in range(rounds):
            for name in names:
                with server(name, name_of_case, path) as running:
                    one = harness.run(measure_one(*running, name, case, keys, seconds))
                if name in found:
                    before = found[name]
                    rates = {number: before.rates[number] + one.rates[number] for number in CONNECTIONS}
                    one = Found(max(one.error, before.error), rates)
                found[name] = one
    return found


def medians(rates: Sequence[Rate]) -> Rate:
    """Returns the median of each number."""
    return Rate(*map(statistics.median, zip(*rates, strict=True)))


def markdown(title: str, found: Mapping[str, Found]) -> list[str]:
    """Returns the part of a report on one model."""
    lines: list[list[str]] = []
    for number in CONNECTIONS:
        ours = medians(found[OURS].rates[number]) if OURS in found else None
        for name, one in found.items():
            rate = medians(one.rates[number])
            times = "" if ours is None else f"{ours.per_s / rate.per_s:.2f}"
            cells = [f"{rate.per_s:,.0f}", times, shown_time(rate.p50_s), shown_time(rate.p99_s), f"{rate.client:.0%}", f"{one.error:.0e}"]
            lines.append([str(number), PEERS[name].title, *cells])
    head = ["connections", "server", "requests/s", "ours is so many times", "p50", "p99", "client", "largest difference"]
    return [f"## {title}", table(head, lines)]


def main() -> None:
    """Measures all servers with each model."""
    parser = harness.parser(__doc__)
    parser.add_argument("--servers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped then, too
    torch.set_num_threads(1)
    parts: list[str] = []
    for name in CASES:
        if chosen.only in (None, name):
            found = measure(name, chosen.servers, chosen.seconds, chosen.rounds)
            parts += markdown(CASES[name](backend="eager").title, found)
    versions: dict[str, Any] = {}
    for package in ("litserve", "fastapi", "uvicorn"):
        with contextlib.suppress(ImportError):
            versions[package] = __import__(package).__version__
    details = "".join([f"; {name} {version}" for name, version in versions.items()])
    harness.publish(harness.report("The engine behind HTTP beside other servers", parts, details), chosen.out)


if __name__ == "__main__":
    main()
