"""The HTTP server among bad clients, hostile tenants and outages: what they try, and that nobody else notices."""

from __future__ import annotations

import ast
import contextlib
import http.client
import itertools
import json
import random
import socket
import sqlite3
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptrt
from adaptrt.errors import StoreUnavailable
from adaptrt.serve import MemoryStore, SQLiteStore
from adaptrt.serve.records import Stamp
from adaptrt.serve.web import Limits
from adaptrt.serve.web import connections as web_connections
from adaptrt.serve.web.errors import HTTPError
from adaptrt.serve.web.protocol import DATATYPES, HEADER_LENGTH, decode
from tests import web
from tests.web import ADAPT, INFER, INPUTS, KEYS, STATE, Alone, Answer, Running, binary, body, builder, data

ANYTHING: Any = list(HealthCheck)
SECRETS = (*KEYS.values(), "adaptrt.", "Traceback", "/work", ".py", "torch", "max_", "store=", "Engine", "unroll")
"""What no error tells: keys, files, modules, settings."""


@pytest.fixture(autouse=True, scope="module")
def _programs_are_compiled_once() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with web.shared_programs():
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with web.running(tmp_path_factory.mktemp("web"), page=True, limits=Limits(body_timeout_s=1.0)) as found:
        yield found


@pytest.fixture(autouse=True)
def _others_are_unaffected(request: pytest.FixtureRequest) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Whatever a test does, bob's state is what it was, the server is up, and nothing is under way any more."""
    if "server" not in request.fixturenames:
        yield
        return
    found: Running = request.getfixturevalue("server")
    found.forget()
    found.adapt(1, key="bob")
    before = found.infer(key="bob").json["outputs"]
    yield
    assert found.infer(key="bob").json["outputs"] == before
    until(lambda: found.engine.stats().num_open == 0)
    app, served = found.server.app, found.server.served
    assert served.stage == "ready" and served._num_uses == 0
    assert not app._adaptations and not app._requests


def until(holds: Any, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def has_state(server: Running, key: str = "ann") -> bool:
    return server.call("DELETE", STATE, key=key).json["forgotten"]


def require_refused(answer: Answer) -> None:
    """A 4xx that says what to change, and nothing of the inside."""
    assert 400 <= answer.status < 500, answer
    assert list(answer.json) == ["error"] and 10 < len(answer.json["error"]) < 1000
    assert not [word for word in SECRETS if word in answer.content.decode()], answer


def raw(server: Running, content: bytes, *, timeout_s: float = 20.0, half_close: bool = False) -> bytes:
    """Sends bytes, and returns what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                found += part
        return found


def head(path: str = ADAPT, method: str = "POST", name: str = "ann", **more: Any) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: h", f"Authorization: Bearer {KEYS[name]}"]
    return "\r\n".join([*lines, *[f"{field.replace('_', '-')}: {value}" for field, value in more.items()], "", ""]).encode()


# Payloads

_HUGE = [-1, 0, 1, 3, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**30, 10**4000]
_ODD: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_HUGE),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 9), max_size=3),
    st.just({}),
)


@st.composite
def payloads(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """A right binary request to adapt, of which something is changed."""
    content, headers = binary(data(1))
    length = int(headers[HEADER_LENGTH])
    fields, tail = json.loads(content[:length]), content[length:]
    for _ in range(draw(st.integers(1, 3))):
        inputs = fields["inputs"]
        target = (
            draw(st.sampled_from([fields, *[entry for entry in inputs if isinstance(entry, dict)]])) if isinstance(inputs, list) else fields
        )
        kind = draw(st.sampled_from(["field", "shape", "type", "size", "drop", "twice", "parameters"]))
        if kind == "field" or target is fields:
            target[draw(st.sampled_from(["inputs", "outputs", "id", "parameters"]))] = draw(_ODD)
        elif kind == "shape":
            target["shape"] = draw(st.lists(st.sampled_from(_HUGE), max_size=70) | _ODD)
        elif kind == "type":
            target["datatype"] = draw(st.sampled_from([found.name for found in DATATYPES]) | _ODD)
        elif kind == "size":
            target["parameters"] = {"binary_data_size": draw(st.sampled_from(_HUGE) | _ODD)}
        elif kind == "drop":
            target.pop(draw(st.sampled_from(["name", "shape", "datatype", "parameters"])), None)
        elif kind == "twice":
            fields["inputs"] = [*inputs, target]
        else:
            target["parameters"] = draw(
                st.dictionaries(st.sampled_from(["timeout", "steps", "binary_data_output", "shared_memory_region"]), _ODD)
            )
    text = json.dumps(fields).encode()
    tail = draw(st.sampled_from([tail, tail[:-1], tail + b"x", b"", tail * 2]))
    size = draw(
        st.sampled_from([str(len(text)), str(len(text) - 1), str(len(text) + 1), "-1", "0", "9" * 30, "x", "", " 5", "１", "1e3"])
        | st.none()
    )
    return text + tail, {} if size is None else {HEADER_LENGTH: size.encode().decode("latin-1")}


@settings(max_examples=250, deadline=None, suppress_health_check=ANYTHING)
@given(payloads())
def test_payloads_that_are_wrong(server: Running, sent: tuple[bytes, dict[str, str]]) -> None:
    answer = server.call("POST", ADAPT, sent[0], headers=sent[1])
    if answer.status == 200:  # what was changed does not matter, or is right, too
        assert has_state(server)
    else:
        require_refused(answer)
        assert not has_state(server)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-1, 250).map(str))
def test_bytes_that_are_nothing(content: bytes, length: str | None) -> None:
    with contextlib.suppress(HTTPError):
        decode(bytearray(content), length)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"inputs": ' + b'[{"x": ' * 500 + b"1" + b"}]" * 500 + b"}",
        b'{"a":' * 5000,
        b'{"inputs": [' + b"9" * 5000 + b"]}",
        b'{"inputs": [], "parameters": {"timeout": ' + b"9" * 400 + b"}}",
        b'{"inputs": [NaN]}',
        b'{"inputs": Infinity}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"inputs": [{"name": "\\ud800", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}',
        b'{"inputs": {}, "inputs": 7}',
        b"null",
        b"",
    ],
)
def test_json_that_is_wrong(server: Running, content: bytes) -> None:
    if len(content) > 2**16:
        content = content[:60_000]
    for path in (ADAPT, INFER):
        require_refused(server.call("POST", path, content))


@pytest.mark.parametrize(
    "change",
    [
        {"data": [1e400] * 18},
        {"data": [10**400] * 18},
        {"data": [1e39] * 18},
        {"data": [True] * 18},
        {"data": ["1"] * 18},
        {"data": [None] * 18},
        {"data": [[1, 2, 3]] * 5 + [[1, 2]]},
        {"data": [[[1], 2, 3]] * 6},
        {"data": {"a": 1}},
        {"data": []},
        {"shape": []},
        {"shape": [6, 3, 1]},
        {"shape": [6, 3.0]},
        {"shape": [6, True]},
        {"shape": [0, 3], "data": []},
        {"shape": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "data": []},
        {"shape": [2**31 - 1] * 64},
        {"shape": [1] * 65},
        {"datatype": "INT64"},
        {"datatype": "fp32"},
        {"name": "support_9"},
        {"name": "x" * 300},
        {"parameters": {"shared_memory_region": "all"}},
        {"parameters": {"binary_data_size": 72}},
    ],
)
def test_tensors_that_are_wrong(server: Running, change: dict[str, Any]) -> None:
    content = body(data(1))
    content["inputs"][0] |= change
    require_refused(server.call("POST", ADAPT, content))
    assert not has_state(server)


def test_data_that_is_found_to_be_wrong_when_it_is_computed(server: Running) -> None:
    x, y = data(1)
    for support in ((torch.full_like(x, float("nan")), y), (x, y + 5), (x, y - 9)):
        content, headers = binary(support)
        require_refused(server.call("POST", ADAPT, content, headers=headers))
    content, headers = binary((), (INPUTS * float("inf"),))
    require_refused(server.call("POST", INFER, content, headers=headers))
    assert not has_state(server)


def test_an_answer_is_not_much_longer_than_what_was_asked(server: Running) -> None:
    """An output that is asked for a thousand times would be."""
    require_refused(server.infer(outputs=[{"name": "output_0"}] * 1000))


def attempt_all(operation: Any, headers: dict[str, str], checks: list[Any]) -> None:
    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=ANYTHING)
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        case.call_and_validate(headers=headers, checks=checks)

    attempt()


def test_described_requests_are_answered_as_described(server: Running) -> None:
    """Schemathesis makes requests from the description, right ones and wrong ones."""
    import schemathesis
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(
        f"http://127.0.0.1:{server.port}/openapi.json", headers={"Authorization": f"Bearer {KEYS['ann']}"}
    )
    schema.config.generation.update(max_examples=8)
    tried: set[str] = set()
    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    for found in schema.get_all_operations():
        operation = cast(Any, found).ok()
        name = "ops" if operation.path.startswith(("/v2/repository", "/metrics")) else "ann"
        attempt_all(operation, {"Authorization": f"Bearer {KEYS[name]}"}, wanted)
        tried.add(operation.path)
    assert len(tried) >= 10


# Bodies


def test_a_packed_body_that_unpacks_to_very_much(server: Running) -> None:
    """Neither it nor a tenth of it is ever in memory."""
    bomb = zlib.compress(b" " * 40_000_000, 9)
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb_gzip = pack.compress(b"[" * 40_000_000) + pack.flush()
    assert len(bomb) < 50_000 and len(bomb_gzip) < 50_000
    tracemalloc.start()
    try:
        for packed, encoding in ((bomb, "deflate"), (bomb_gzip, "gzip")):
            answer = server.call("POST", ADAPT, packed, headers={"Content-Encoding": encoding})
            assert answer.status == 413
            require_refused(answer)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_a_body_in_pieces_without_an_end(server: Running) -> None:
    """It is refused as soon as it is too long; what comes afterwards is not kept."""
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    tracemalloc.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head(Transfer_Encoding="chunked"))
            sent = 0
            with contextlib.suppress(ConnectionError):
                for _ in range(400):  # 26 MB
                    connection.sendall(piece)
                    sent += 1
            assert sent < 400
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sent", [b'{"inputs": [', b""])
def test_a_body_that_does_not_go_on(server: Running, sent: bytes) -> None:
    answer = raw(server, head(Content_Length=500) + sent)
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower() and b"send it faster" in answer


def test_bodies_of_one_tenant_take_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    """However many connections it opens, and whether their bodies ever end."""
    content = json.dumps(body(data(1))).encode()
    with web.running(tmp_path, limits=Limits(max_requests=3)) as found, contextlib.ExitStack() as opened:
        begun = [opened.enter_context(socket.create_connection(("127.0.0.1", found.port), timeout=20)) for _ in range(3)]
        for connection in begun:
            connection.sendall(head(Content_Length=len(content)) + content[:100])
        until(lambda: found.server.app._requests.num_of("ann") == 3)
        for answer in (found.adapt(), found.infer()):
            require_refused(answer)
            assert answer.status == 429 and answer.json["error"].startswith("3 requests of yours are under way")
        assert found.adapt(key="bob").status == 200
        for connection in begun:
            connection.sendall(content[100:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: not found.server.app._requests)
        assert found.infer().status == 200


def test_a_body_that_comes_byte_by_byte(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head(Content_Length=10_000))
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 10:
                connection.sendall(b" ")
                time.sleep(0.05)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if connection.recv(100).startswith(b"HTTP/1.1 408"):
                        return
                connection.setblocking(True)
        raise AssertionError("it was read for ten seconds")


def test_a_body_that_ends_early(server: Running) -> None:
    content = json.dumps(body(data(1))).encode()
    raw(server, head(Content_Length=len(content) + 1) + content, half_close=True)
    raw(server, head(Content_Length=len(content)) + content[:-1], half_close=True)
    assert not has_state(server)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 500,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nX: a\r\n b\x00\r\n\r\n",
    ],
)
def test_requests_that_are_none(server: Running, content: bytes) -> None:
    status = raw(server, content, half_close=True).partition(b"\r\n")[0]
    assert status in (b"", b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 401 Unauthorized")


def test_headers_without_an_end(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs a key for these: many, one long one, a long address, trailers, and ones that do not come."""
    more = b"".join([b"X-%d: y\r\n" % number for number in range(200_000)])
    long = b"y" * 8_000_000
    chunked = b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    starts = [
        b"GET /v2 HTTP/1.1\r\n",
        b"GET /v2 HTTP/1.1\r\nX: ",
        b"GET /",
        b"",
        chunked + b"0\r\n",
        chunked + b"0\r\nX: ",
        chunked + b"5;x=",
    ]
    tracemalloc.start()
    try:
        for start, rest in zip(starts, [more, long, long, b"\r\n" * 4_000_000, more, long, long], strict=True):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(start)
                    connection.sendall(rest)
                with contextlib.suppress(ConnectionError):
                    answer = connection.recv(1000)
                    assert answer == b"" or answer.split(b"\r\n")[0].split()[1] in (b"400", b"401")
                    while connection.recv(1000):
                        pass
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(web_connections, "HEADERS_S", 0.3)
    for content in (b"", b"GET /v2 HTTP/1.1\r\nX: y", b"\r\n"):
        began = time.monotonic()
        raw(server, content)
        assert time.monotonic() < began + 4
    assert server.infer().status == 200


def test_requests_behind_each_other_on_one_connection(server: Running) -> None:
    """Also of two tenants, as a proxy sends them."""
    one = json.dumps(body((), (INPUTS,))).encode()
    names, closes = ("ann", "bob", "ann"), ({}, {}, {"Connection": "close"})
    sent = [head(INFER, name=name, Content_Length=len(one), **more) + one for name, more in zip(names, closes, strict=True)]
    found = raw(server, b"".join(sent)).split(b"HTTP/1.1 200 OK")[1:]
    outputs = [json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"] for answer in found]
    assert len(outputs) == 3
    assert outputs[0] == outputs[2] == server.infer().json["outputs"] and outputs[1] == server.infer(key="bob").json["outputs"]


# Clients that leave


class Hold:
    """Holds the compute thread before a batch of adaptations."""

    def __init__(self, server: Running) -> None:
        self.is_open, self.reached = threading.Event(), threading.Event()
        lanes = server.engine._core._lanes
        real = lanes.adapt

        def adapt(works: Any) -> Any:
            self.reached.set()
            assert self.is_open.wait(20)
            return real(works)

        lanes.adapt = adapt  # type: ignore[method-assign]
        self._undo = lambda: setattr(lanes, "adapt", real)

    def open(self) -> None:
        self.is_open.set()
        self._undo()


def test_a_client_that_leaves_in_the_middle_of_its_adaptation(server: Running) -> None:
    held = Hold(server)
    content = json.dumps(body(data(1))).encode()
    answers: list[Answer] = []
    other = threading.Thread(target=lambda: answers.append(server.adapt(2, key="cyd")))
    try:
        leaving = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(2)]
        for connection in leaving:
            connection.sendall(head(Content_Length=len(content)) + content)
        assert held.reached.wait(20)
        other.start()
        until(lambda: server.engine.stats().num_open == 3)
        for connection in leaving:
            connection.close()
        until(lambda: not server.server.app._adaptations.num_of("ann"))
    finally:
        held.open()
    other.join(20)
    assert answers[0].status == 200
    torch.testing.assert_close(answers[0].tensor("losses"), torch.tensor(Alone().adapt(data(2))))
    until(lambda: server.engine.stats().num_open == 0)
    assert not has_state(server) and 'status="499"' in server.get("/metrics", "ops").content.decode()


@pytest.mark.parametrize("seed", range(3))
def test_clients_that_do_what_they_like(server: Running, seed: int) -> None:
    """Connections that are cut anywhere, at once with good requests: the state is that of what was acknowledged, or one more."""
    random_ = random.Random(seed)
    content = json.dumps(body(data(3))).encode()
    whole = head(Content_Length=len(content)) + content
    done: list[Answer] = []

    def good() -> None:
        for number in range(10):
            done.append(server.adapt(number, key="cyd"))

    thread = threading.Thread(target=good)
    thread.start()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(whole[: random_.choice([0, 5, 60, len(whole) - 1, len(whole), len(whole)])])
            if random_.random() < 0.5:
                time.sleep(random_.random() * 0.01)
            if random_.random() < 0.3:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
    thread.join(30)
    alone = Alone()
    for number, answer in enumerate(done):
        torch.testing.assert_close(answer.tensor("losses"), torch.tensor(alone.adapt(data(number))), rtol=1e-4, atol=1e-5)
    until(lambda: server.engine.stats().num_open == 0)
    torch.testing.assert_close(server.infer(key="cyd").tensor("output_0"), alone.predict(INPUTS), rtol=1e-4, atol=1e-5)


# Tenants


@pytest.mark.parametrize("key", ["ann", "eve", "Ann"])
def test_no_tenant_reaches_another(server: Running, key: str) -> None:
    """Bob has a state. Whatever others say about who they are, theirs is theirs."""
    base = server.infer(key=key).json["outputs"]
    assert base != server.infer(key="bob").json["outputs"]
    says = {"tenant": "bob", "user": "bob", "sub": "bob", "principal": "bob", "name": "bob", "sequence_id": "bob", "correlation_id": "bob"}
    headers = {
        **{
            name: "bob"
            for name in ("X-Forwarded-User", "X-Remote-User", "Remote-User", "X-User", "X-Tenant", "X-Tenant-Id", "From", "Cookie")
        },
        "X-Original-URL": "/metrics",
        "X-Rewrite-URL": "/metrics",
        "X-HTTP-Method-Override": "DELETE",
        "Forwarded": "for=bob;by=bob",
        "X-Forwarded-For": "127.0.0.1",
        "baggage": "tenant=bob",
    }
    for content in (
        body((), (INPUTS,), parameters=says, **says),
        body((), (INPUTS,), id="bob", parameters={"tenant": {"name": "bob"}}),
    ):
        for path in (INFER, f"{INFER}?tenant=bob&user=bob", f"{INFER};tenant=bob", f"{INFER}#bob"):
            answer = server.call("POST", path, content, key=key, headers=headers)
            assert answer.status == 404 or answer.json["outputs"] == base
    for path in ("/bob", "?tenant=bob", "/../state?tenant=bob", "%2f..%2fbob", "%00bob", "/%2e%2e/state"):
        answer = server.call("DELETE", STATE + path, key=key, headers=headers)
        assert answer.status in (404, 405) or answer.json == {"model_name": "model", "forgotten": False}
    adapted = server.call("POST", ADAPT, body(data(5), parameters=says), key=key, headers=headers)
    torch.testing.assert_close(adapted.tensor("losses"), torch.tensor(Alone().adapt(data(5))))
    for name in ("ann", "eve", "Ann", "cyd"):
        if name != key:
            assert server.infer(key=name).json["outputs"] == base
    assert server.call("DELETE", STATE, key=key).json["forgotten"] is True


def test_names_that_look_alike_are_different_tenants(tmp_path: Path) -> None:
    import hashlib

    names = ["ann", "Ann", "ａｎｎ", "аnn", "ann.", "e\u0301", "\u00e9", "../ann", "ann/state", "ann%00", "*", "0"]
    lines = [f"{name} tenant {hashlib.sha256(f'key {index}'.encode()).hexdigest()}" for index, name in enumerate(names)]
    (tmp_path / "keys").write_text("\n".join(lines), encoding="utf-8")
    with web.running(tmp_path, builder(SQLiteStore(tmp_path / "tenants.db")), keys=str(tmp_path / "keys")) as found:

        def call(index: int, method: str, path: str, content: Any) -> Answer:
            return found.call(method, path, content, key=None, headers={"Authorization": f"Bearer key {index}"})

        for index in range(0, len(names), 2):
            assert call(index, "POST", ADAPT, body(data(index))).status == 200
        for index in range(len(names)):
            assert call(index, "DELETE", STATE, None).json["forgotten"] is (index % 2 == 0)


def test_paths_that_are_tricks(server: Running) -> None:
    for path in (
        "//v2",
        "/v2/",
        "/v2//models/model",
        "/V2",
        "/v2/models/MODEL",
        "/v2/models/model%2finfer",
        "/%2e%2e/metrics",
        "/page/../metrics",
        "/page%2fsummary/",
        "/static/../page.py",
    ):
        answer = server.get(path)
        assert answer.status in (403, 404, 405), path
        require_refused(answer)
    assert server.call("GET", "/v2/mod%65ls/model").status == 200  # the same address
    for path in ("/metrics", "/%6detrics", "/", "/page/summary", "/page.js"):
        assert server.get(path).status == 403


# Sources


def test_nothing_is_unpickled_and_nothing_is_run() -> None:
    """Neither here nor anywhere in what serves."""
    folder = Path(adaptrt.__file__).parent / "serve"
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {name.name.split(".")[0] for name in node.names} & {
                    "pickle",
                    "cloudpickle",
                    "dill",
                    "marshal",
                    "shelve",
                    "subprocess",
                }, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "subprocess"), file
            elif isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                assert text not in ("eval", "exec", "torch.load", "torch.save", "pickle.loads", "__import__", "os.system"), file
                if text.endswith((".load", ".loads")):
                    assert text.split(".")[0] in ("json", "orjson", "self", "states"), (file, text)


# Outages


class Failing(SQLiteStore):
    """A store that can be told to fail."""

    is_down = False

    def _maybe(self) -> None:
        if self.is_down:
            raise StoreUnavailable("/secret/path/tenants.db cannot be read or written: disk I/O error")

    def get(self, tenant: str) -> Any:
        self._maybe()
        return super().get(tenant)

    def commit_all(self, changes: Any) -> list[bool]:
        self._maybe()
        return super().commit_all(changes)

    def delete(self, tenant: str) -> bool:
        self._maybe()
        return super().delete(tenant)


def test_a_store_that_does_not_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is adapted or forgotten, and predictions go on: of states in memory, and otherwise of the base."""
    store = Failing(tmp_path / "tenants.db")
    with web.running(tmp_path, builder(store)) as found:
        assert found.adapt().status == 200
        before, base = found.infer().json["outputs"], found.infer(key="bob").json["outputs"]
        store.is_down = True
        for answer in (found.adapt(2), found.adapt(key="bob"), found.call("DELETE", STATE)):
            assert answer.status == 503 and answer.headers["retry-after"] == "1" and "nothing was changed" in answer.json["error"]
            assert not [word for word in (*SECRETS, "secret") if word in answer.content.decode()]
        assert found.infer().json["outputs"] == before and found.infer(key="bob").json["outputs"] == base
        assert found.call("POST", INFER, body(data(2), (INPUTS,))).status == 200
        store.is_down = False
        until(lambda: found.adapt(2).status == 200)
        alone = Alone()
        alone.adapt(data(1))
        alone.adapt(data(2))
        torch.testing.assert_close(found.infer().tensor("output_0"), alone.predict(INPUTS))
    store.close()
    assert "StoreUnavailable" in [record.__dict__.get("fields", {}).get("error") for record in caplog.records]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """An adaptation that has no room is refused, and those before it are whole."""
    store = SQLiteStore(tmp_path / "tenants.db")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 4}")
    names = ["ann", "bob", "cyd", "dee", "eve"]
    with web.running(tmp_path, builder(store)) as found:
        answers = {name: found.adapt(key=name) for name in names}
        kept = [name for name in names if answers[name].status == 200]
        assert 0 < len(kept) < 5 and {answer.status for answer in answers.values()} == {200, 503}
    store.close()
    store = SQLiteStore(tmp_path / "tenants.db")
    assert [name for name in names if store.get(name) is not None] == kept
    with web.running(tmp_path, builder(store)) as found:
        alone = Alone()
        alone.adapt(data(1))
        for name in kept:
            torch.testing.assert_close(found.infer(key=name).tensor("output_0"), alone.predict(INPUTS))
        assert found.adapt(key="dee").status == 200  # there is room again
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "tenants.db")) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("step_s", [-1e9, 1e9])
def test_steps_of_the_wall_clock_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Neither for deadlines, nor for how long states and connections live."""
    real = time.time
    stores = [MemoryStore(2**20, ttl_s=3600), SQLiteStore(tmp_path / "tenants.db", ttl_s=3600)]
    for store in stores:
        with web.running(tmp_path, builder(store, max_tenants=2)) as found:
            assert found.adapt().status == 200
            before = found.infer().content
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: real() + step_s)
                assert abs(Stamp.now().wall_s - real()) > 1e8
                assert found.infer(parameters={"timeout": 20_000_000}).content == before
                second = found.adapt(2, parameters={"timeout": 20_000_000})
                assert second.status == 200
                alone = Alone()
                alone.adapt(data(1))
                torch.testing.assert_close(second.tensor("losses"), torch.tensor(alone.adapt(data(2))))
            torch.testing.assert_close(found.infer().tensor("output_0"), alone.predict(INPUTS))
        store.close()


@pytest.mark.slow
def test_what_was_acknowledged_outlives_the_process(tmp_path: Path) -> None:
    """The server is killed in the middle of commits. What its clients had an answer for is there afterwards, and at most one more."""
    acknowledged: dict[str, list[int]] = {name: [] for name in ("ann", "bob", "cyd")}

    def adapt_always(found: web.Process, name: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            for number in itertools.count():
                answer = found.adapt(number % 50, key=name)
                assert answer.status == 200
                acknowledged[name].append(answer.json["parameters"]["state_version"])

    with web.process(tmp_path) as found:
        found.wait_for_port()
        found.wait_until_ready()
        threads = [threading.Thread(target=adapt_always, args=(found, name)) for name in acknowledged]
        for thread in threads:
            thread.start()
        until(lambda: min(map(len, acknowledged.values())) >= 10)
        found.process.kill()
        for thread in threads:
            thread.join(20)
    store = SQLiteStore(tmp_path / "tenants.db")
    try:
        with web.running(tmp_path, builder(store)) as again:
            for name, versions in acknowledged.items():
                assert versions == sorted(versions)  # one that the guard refused has the version before
                record = store.get(name)
                assert record is not None and record.version - versions[-1] in (0, 1)
                alone = Alone()
                for number in range(len(versions) + record.version - versions[-1]):
                    alone.adapt(data(number % 50))
                torch.testing.assert_close(again.infer(key=name).tensor("output_0"), alone.predict(INPUTS), rtol=1e-3, atol=1e-4)
    finally:
        store.close()
