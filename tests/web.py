"""Servers and clients for tests of HTTP: a small model behind a real socket, or in a process of its own, and bodies of requests."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import CompiledUnroll
from adaptrt.serve import Engine, Lifecycle, MemoryStore, SQLiteStore, Store, programs
from adaptrt.serve.web import Built, Server, Settings, log_to_stderr
from adaptrt.serve.web.model import Stage
from adaptrt.serve.web.protocol import HEADER_LENGTH, datatype_of

KEYS = {name: f"key-of-{name}-{number}" for number, name in enumerate(("ann", "bob", "cyd", "dee", "eve", "Ann", "ops"))}
MODEL = "/v2/models/model"
INFER, ADAPT, STATE, LOAD = f"{MODEL}/infer", f"{MODEL}/adapt", f"{MODEL}/state", "/v2/repository/models/model/load"
_DRAWN = torch.Generator().manual_seed(0)
INPUTS = torch.randn(4, 3, generator=_DRAWN)


def make(seed: int = 3, **changes: Any) -> CompiledUnroll:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    wanted: dict[str, Any] = {"loss": F.cross_entropy, "backend": "eager", **changes}
    return adaptrt.compile_unroll(model, adaptrt.optim.adam(lr=0.3), 2, **wanted)


@functools.cache
def shared_unroll(seed: int = 3) -> CompiledUnroll:
    return make(seed)


def data(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator), torch.randint(2, (size,), generator=generator)


def builder(store: Store | None = None, *, seed: Callable[[], int] = lambda: 3, **changes: Any) -> Callable[[], Built]:
    """Returns what builds engines on a store. `seed`: of the next engine's weights."""
    store = MemoryStore(2**24) if store is None else store

    def build() -> Built:
        example = data(0), INPUTS
        wanted: dict[str, Any] = {"lanes": (1, 4), "max_delay_s": 0.001, "store": store, **changes}
        return Built(Engine(shared_unroll(seed()), example, **wanted), example)

    return build


class Alone:
    """One tenant, without server and engine: calls of the unroll, one after the other."""

    def __init__(self, unroll: CompiledUnroll | None = None) -> None:
        self._unroll = unroll or shared_unroll()
        self._state = self._unroll.start()

    def adapt(self, support: Any) -> list[float]:
        with torch.no_grad():
            self._state = self._unroll.adapt(support, start=self._state, keep="not_worse")
        return self._state.losses.tolist()

    def predict(self, inputs: Any) -> Any:
        with torch.no_grad():
            return self._state(inputs)


# Bodies


def entry(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "datatype": datatype_of(tensor.dtype), "data": tensor.reshape(-1).tolist()}


def body(support: Sequence[Tensor] = (), query: Sequence[Tensor] = (), **fields: Any) -> dict[str, Any]:
    named = {f"support_{index}": value for index, value in enumerate(support)}
    named |= {f"query_{index}": value for index, value in enumerate(query)}
    return {"inputs": [entry(name, value) for name, value in named.items()], **fields}


def binary(support: Sequence[Tensor] = (), query: Sequence[Tensor] = (), **fields: Any) -> tuple[bytes, dict[str, str]]:
    """Returns a body with tensors as bytes, and the header that it needs."""
    content, parts = body(support, query, **fields), []
    for found, tensor in zip(content["inputs"], [*support, *query], strict=True):
        del found["data"]
        parts.append(tensor.numpy().tobytes())
        found["parameters"] = {"binary_data_size": len(parts[-1])}
    header = json.dumps(content).encode()
    return header + b"".join(parts), {HEADER_LENGTH: str(len(header))}


class Answer(NamedTuple):
    """Of a server."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    def tensor(self, name: str) -> Tensor:
        found = next(output for output in self.json["outputs"] if output["name"] == name)
        return torch.tensor(found["data"]).reshape(found["shape"])


# Servers


def write_keys(path: Path, names: Sequence[str] = tuple(KEYS)) -> str:
    lines = [f"{name} {'operator' if name == 'ops' else 'tenant'} {hashlib.sha256(KEYS[name].encode()).hexdigest()}\n" for name in names]
    path.write_text("# keys\n" + "".join(lines))
    return str(path)


class Client:
    """Sends requests to a port of this machine."""

    port: int

    def call(
        self, method: str, path: str, content: Any = None, *, key: str | None = "ann", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """`content`: JSON, or bytes as they are. `key`: whose key to send, None for none."""
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {KEYS[key]}"
        raw = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, raw, sent)
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str, key: str | None = "ann") -> Answer:
        return self.call("GET", path, key=key)

    def adapt(self, seed: int = 1, key: str | None = "ann", **fields: Any) -> Answer:
        return self.call("POST", ADAPT, body(data(seed), **fields), key=key)

    def infer(self, inputs: Tensor = INPUTS, key: str | None = "ann", **fields: Any) -> Answer:
        return self.call("POST", INFER, body((), (inputs,), **fields), key=key)

    def forget(self, *names: str) -> None:
        for name in names or [name for name in KEYS if name != "ops"]:
            assert self.call("DELETE", STATE, key=name).status == 200

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready", key="ops").status == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not become ready")


def port_of(server: Server) -> int:
    """Returns where a server listens, 0 if it does not."""
    sockets = server.servers[0].sockets if server.started else ()
    return sockets[0].getsockname()[1] if sockets else 0


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Engines of the same unroll, sizes and guard share their programs, which are otherwise compiled by each."""
    known: dict[Any, Any] = {}

    def programs_of(*key: Any) -> Any:
        if not isinstance(key[0], CompiledUnroll):  # the folder of an export may hold another one now
            return programs.programs_of(*key)
        if key not in known:
            known[key] = programs.programs_of(*key)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptrt.serve.engine.programs_of", programs_of)
        yield


class Running(Client):
    """A server on a thread of its own."""

    def __init__(self, build: Callable[[], Built], keys: str | None, **settings: Any) -> None:
        self.server = Server(build, Settings(port=0, keys=keys, **settings))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        until = time.monotonic() + 60
        while not self.server.started and self.thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        self.port = port_of(self.server)

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # the server notes it as its failure
            self.server.run_until_stopped()

    @property
    def engine(self) -> Engine:
        return self.server.served.ready().engine

    def wait(self, stage: Stage = Stage.READY) -> Running:
        until = time.monotonic() + 60
        while self.server.served.stage is not stage:
            assert self.thread.is_alive() and time.monotonic() < until, self.server.failure
            time.sleep(0.01)
        return self

    def engine_is_stopped(self) -> bool:
        ready = self.server.served._ready
        return ready is not None and ready.engine.stats().lifecycle is Lifecycle.STOPPED

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(folder: Path, build: Callable[[], Built] | None = None, **settings: Any) -> Iterator[Running]:
    keys = settings.pop("keys") if "keys" in settings else write_keys(folder / "keys")
    found = Running(build or builder(), keys, **settings)
    try:
        yield found.wait()
    finally:
        found.stop()


class Process(Client):
    """A server in a process of its own, on a file of SQLite, with its log in a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        write_keys(folder / "keys")
        self.log = folder / f"log-{time.monotonic_ns()}"
        root = Path(adaptrt.__file__).parent.parent
        with open(self.log, "wb") as log:
            command = [sys.executable, "-W", "error", "-m", "tests.web", str(folder), *arguments]
            self.process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log)

    def wait_for_port(self) -> None:
        until = time.monotonic() + 90
        while True:
            found = [line for line in self.log.read_text().splitlines() if line.startswith("port ")]
            if found:
                self.port = int(found[0].split()[1])
                return
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def process(folder: Path, *arguments: str) -> Iterator[Process]:
    found = Process(folder, *arguments)
    try:
        yield found
    finally:
        found.end()


def main(folder: Path, kind: str = "good") -> int:
    """Serves until it is told to end, as a command would."""
    torch.set_num_threads(1)
    log_to_stderr()
    store = SQLiteStore(folder / "tenants.db")
    good = builder(store)

    def build() -> Built:
        if kind == "bad":
            raise adaptrt.errors.InvalidArgument("this model cannot be built")
        if kind == "slow":
            time.sleep(0.5)
        return good()

    server = Server(build, Settings(port=0, keys=str(folder / "keys")))

    def tell() -> None:
        while not server.started:
            time.sleep(0.01)
        print("port", port_of(server), flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        server.run_until_stopped()
    except adaptrt.errors.AdaptrtError as error:
        logging.getLogger("adaptrt.serve").error(str(error))
        return 1
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
