"""The engine behind HTTP: the protocol, routes, keys and tokens, limits, what is logged and counted, the lifecycle, and new versions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import hmac
import io
import json
import logging
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tritonclient.http as triton
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import InvalidArgument
from adaptrt.serve import Engine, MemoryStore, SQLiteStore, Store
from adaptrt.serve.web import Built, Limits, Principals, Server, Settings, Tokens, add_key, read_keys
from adaptrt.serve.web import errors as web_errors
from adaptrt.serve.web.errors import HTTPError
from adaptrt.serve.web.model import Stage
from adaptrt.serve.web.names import Form
from adaptrt.serve.web.protocol import DATATYPES, HEADER_LENGTH, Request, decode, encode
from adaptrt.serve.web.telemetry import JSONLines
from tests import web
from tests.web import ADAPT, INFER, INPUTS, KEYS, LOAD, MODEL, STATE, Alone, Running, binary, body, builder, data


@pytest.fixture(autouse=True, scope="module")
def _programs_are_compiled_once() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with web.shared_programs():
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with web.running(tmp_path_factory.mktemp("web")) as found:
        yield found


@pytest.fixture(autouse=True)
def _no_states(request: pytest.FixtureRequest) -> None:  # pyright: ignore[reportUnusedFunction]
    if "server" in request.fixturenames:
        request.getfixturevalue("server").forget()


# The protocol


def test_what_the_server_and_the_model_say_of_themselves(server: Running) -> None:
    assert server.get("/v2").json == {
        "name": "adaptrt",
        "version": adaptrt.__version__,
        "extensions": ["binary_tensor_data", "model_repository", "adaptrt_adapt", "adaptrt_state"],
    }
    assert server.get("/v2/health/live").json == {"live": True}
    assert server.get("/v2/health/ready").json == {"ready": True, "stage": "ready"}
    found = server.get(MODEL).json
    (version,) = found["versions"]
    assert server.get(f"{MODEL}/ready").json == {"name": "model", "ready": True, "version": version}
    assert found["inputs"] == [
        {"name": "support_0", "datatype": "FP32", "shape": [-1, 3], "optional": True},
        {"name": "support_1", "datatype": "INT64", "shape": [-1], "optional": True},
        {"name": "query_0", "datatype": "FP32", "shape": [-1, 3], "optional": True},
    ]
    assert [(output["name"], output["shape"]) for output in found["outputs"]] == [("output_0", [-1, 2]), ("losses", [2]), ("kept", [1])]
    assert found["parameters"] == {
        "steps": 2,
        "support_examples": [6],
        "support_examples_may_be_fewer": False,
        "query_examples": [4],
        "query_examples_may_be_fewer": True,
    }
    # What is said of sizes, extensions and outputs is true.
    assert server.infer(INPUTS[:1]).tensor("output_0").shape == (1, 2)
    assert server.call("POST", ADAPT, body(data(1, 5))).status == 400
    for text in found["extensions"].values():
        if text.split()[0].isupper():
            method, path = text.split()[:2]
            assert server.call(method, path.format(model="model"), body(data(1))).status == 200
    answer = server.call("POST", INFER, body(data(1), (INPUTS,)))
    said = {output["name"]: output["datatype"] for output in found["outputs"]}
    assert {output["name"]: output["datatype"] for output in answer.json["outputs"]} == said


def test_numbers_are_those_of_the_unroll_alone(server: Running) -> None:
    alone = Alone()
    torch.testing.assert_close(server.infer().tensor("output_0"), alone.predict(INPUTS))
    versions = []
    for seed in (1, 2, 3):
        answer = server.adapt(seed)
        torch.testing.assert_close(answer.tensor("losses"), torch.tensor(alone.adapt(data(seed))))
        assert answer.tensor("kept").tolist() == [True]
        versions.append(answer.json["parameters"]["state_version"])
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]
    torch.testing.assert_close(server.infer().tensor("output_0"), alone.predict(INPUTS))
    # Of both kinds of tensors: from the base, and nothing is kept.
    fresh = Alone()
    answer = server.call("POST", INFER, body(data(7), (INPUTS,)))
    torch.testing.assert_close(answer.tensor("losses"), torch.tensor(fresh.adapt(data(7))))
    torch.testing.assert_close(answer.tensor("output_0"), fresh.predict(INPUTS))
    torch.testing.assert_close(server.infer().tensor("output_0"), alone.predict(INPUTS))
    # infer with support tensors alone is adapt.
    torch.testing.assert_close(server.call("POST", INFER, body(data(4))).tensor("losses"), torch.tensor(alone.adapt(data(4))))
    assert server.call("DELETE", STATE).json == {"model_name": "model", "forgotten": True}
    assert server.call("DELETE", STATE).json["forgotten"] is False
    torch.testing.assert_close(server.infer().tensor("output_0"), Alone().predict(INPUTS))


def as_inputs(named: Mapping[str, Tensor], is_binary: bool) -> list[triton.InferInput]:
    found = []
    for name, tensor in named.items():
        kinds = {torch.float32: "FP32", torch.int64: "INT64"}
        found.append(triton.InferInput(name, list(tensor.shape), kinds[tensor.dtype]))
        found[-1].set_data_from_numpy(tensor.numpy(), binary_data=is_binary)
    return found


def numbers(found: triton.InferResult | None, name: str) -> Any:
    assert found is not None
    return found.as_numpy(name)


def header() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS['ann']}"}  # a new one each time, as the client writes into it


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False])
def test_the_client_of_triton_works_as_it_is(server: Running, is_binary: bool, packed: str | None) -> None:
    support: dict[str, Tensor] = dict(zip(("support_0", "support_1"), data(2), strict=True))
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert client.is_server_live(headers=header()) and client.is_server_ready(headers=header())
        assert client.is_model_ready("model", headers=header())
        version = client.get_model_metadata("model", headers=header())["versions"][0]
        assert client.is_model_ready("model", version, headers=header())
        outputs = None if packed is None else [triton.InferRequestedOutput("output_0", binary_data=is_binary)]
        sent: dict[str, Any] = {"headers": header(), "request_compression_algorithm": packed, "outputs": outputs, "request_id": "7"}
        named = {**support, "query_0": INPUTS}
        found = client.infer("model", as_inputs(named, is_binary), version, timeout=20_000_000, **sent)
        alone = Alone()
        losses = alone.adapt(data(2))
        assert found is not None and found.get_response()["id"] == "7" and found.get_response()["model_version"] == version
        np.testing.assert_allclose(numbers(found, "output_0"), alone.predict(INPUTS).numpy(), rtol=1e-5)
        if outputs is None:
            np.testing.assert_allclose(numbers(found, "losses"), losses, rtol=1e-5)
            assert numbers(found, "kept").tolist() == [True]
        sent |= {"headers": header(), "outputs": None}
        assert numbers(client.infer("model", as_inputs(support, is_binary), **sent), "kept").dtype == np.bool_
        found = client.infer("model", as_inputs({"query_0": INPUTS}, is_binary), headers=header())
        np.testing.assert_allclose(numbers(found, "output_0"), alone.predict(INPUTS).numpy(), rtol=1e-5)
        with pytest.raises(triton.InferenceServerException, match="there is no input 'nothing'"):
            client.infer("model", as_inputs({"nothing": INPUTS}, is_binary), headers=header())
        client.load_model("model", headers={"Authorization": f"Bearer {KEYS['ops']}"})


_VALUES = {
    "BOOL": [True, False, True, True, False, True],
    "UINT8": [0, 1, 127, 128, 255, 7],
    "INT8": [-128, -1, 0, 1, 127, 7],
    "INT16": [-(2**15), -1, 0, 1, 2**15 - 1, 7],
    "INT32": [-(2**31), -1, 0, 1, 2**31 - 1, 7],
    "INT64": [-(2**63), -1, 0, 1, 2**63 - 1, 7],
    "FP16": [0.5, -2.0, 0, 65504.0, 1e-7, 3],
    "BF16": [0.5, -2.0, 0, 2.0**127, 1, 3],
    "FP32": [0.1, -2.5, 0, 1e38, 1e-45, 3],
    "FP64": [0.1, -2.5, 0, 1e308, 5e-324, 3],
}


@pytest.mark.parametrize("datatype", DATATYPES, ids=lambda found: found.name)
def test_every_datatype_in_both_forms(datatype: Any) -> None:
    wanted = torch.tensor(_VALUES[datatype.name], dtype=datatype.dtype).reshape(2, 3)
    described = {"name": "x", "shape": [2, 3], "datatype": datatype.name}
    for values in (_VALUES[datatype.name], [_VALUES[datatype.name][:3], _VALUES[datatype.name][3:]]):
        sent = {"inputs": [{**described, "data": values}]}
        assert torch.equal(decode(bytearray(json.dumps(sent).encode()), None).inputs["x"], wanted)
    raw = bytes(wanted.reshape(-1).view(torch.uint8).tolist())
    head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": len(raw)}}]}).encode()
    found = decode(bytearray(head + raw), str(len(head))).inputs["x"]
    assert torch.equal(found, wanted) and found.dtype == datatype.dtype
    for is_binary in (False, True):
        request = Request(None, {}, {}, (), is_binary)
        answer, length = encode({}, {"y": wanted.t()}, request)  # an output that is not contiguous
        fields = json.loads(answer[:length])["outputs"][0]
        assert (fields["datatype"], fields["shape"]) == (datatype.name, [3, 2])
        if is_binary:
            back = torch.frombuffer(bytearray(answer[length:]), dtype=datatype.dtype).reshape(3, 2)
        else:
            back = torch.tensor(fields["data"], dtype=torch.float64 if datatype.name == "FP64" else datatype.dtype).reshape(3, 2)
        assert torch.equal(back.to(datatype.dtype), wanted.t())
    empty = decode(bytearray(json.dumps({"inputs": [{**described, "shape": [0, 3], "data": []}]}).encode()), None)
    assert empty.inputs["x"].shape == (0, 3)


def test_ids_and_outputs_that_are_asked_for(server: Running) -> None:
    answer = server.infer(id="a b\u2028ü")
    assert answer.json["id"] == "a b\u2028ü" and "id" not in server.infer().json
    assert server.infer(id="\ud800").status == 400  # half of a character
    both = body(data(1), (INPUTS,))
    assert [found["name"] for found in server.call("POST", INFER, both).json["outputs"]] == ["output_0", "losses", "kept"]
    asked = {**both, "outputs": [{"name": "kept"}, {"name": "output_0", "parameters": {"binary_data": True}}]}
    answer = server.call("POST", INFER, asked)
    length = int(answer.headers[HEADER_LENGTH.lower()])
    first, second = json.loads(answer.content[:length])["outputs"]
    assert first["data"] == [True] and second["parameters"] == {"binary_data_size": 32} and len(answer.content) == length + 32
    asked = {**both, "parameters": {"binary_data_output": True}, "outputs": [{"name": "kept", "parameters": {"binary_data": False}}]}
    assert server.call("POST", INFER, asked).json["outputs"][0]["data"] == [True]
    content, headers = binary(data(1), (INPUTS,), parameters={"binary_data_output": True})
    answer = server.call("POST", INFER, content, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert len(answer.content) - int(answer.headers[HEADER_LENGTH.lower()]) == 32 + 8 + 1


@pytest.mark.parametrize(
    "outputs", [[{"name": "output_0"}], [{"name": "losses"}, {"name": "no"}], [{"name": "kept"}] * 2, [{}], [{"name": 3}], [7], 3, "kept"]
)
def test_an_output_that_does_not_exist_is_refused_before_anything_is_done(server: Running, outputs: Any) -> None:
    assert server.adapt(outputs=outputs).status == 400
    assert server.call("DELETE", STATE).json["forgotten"] is False


def test_a_state_that_was_kept_is_answered_even_if_its_losses_have_no_form_in_json() -> None:
    losses = torch.tensor([float("nan"), float("inf"), 0.5])
    answer, _ = encode({}, {"losses": losses}, Request(None, {}, {}, (), False), nullable=("losses",))
    assert json.loads(answer)["outputs"][0]["data"] == [None, None, 0.5]
    with pytest.raises(HTTPError, match="NaN or infinity") as found:
        encode({}, {"output_0": losses}, Request(None, {}, {}, (), False), nullable=("losses",))
    assert found.value.status == 422


def test_an_adaptation_that_was_kept_and_whose_losses_have_no_form_in_json(server: Running) -> None:
    engine, real = server.engine, server.engine.adapt

    async def adapt(*args: Any) -> Any:
        return (await real(*args))._replace(losses=(float("nan"), float("inf")))

    engine.adapt = adapt  # type: ignore[method-assign]
    try:
        answer = server.adapt()
    finally:
        del engine.adapt
    assert answer.status == 200 and answer.tensor("kept").tolist() == [True]
    assert answer.json["outputs"][0]["data"] == [None, None]
    assert server.call("DELETE", STATE).json["forgotten"] is True


def test_versions_in_addresses(server: Running) -> None:
    version = server.get(MODEL).json["versions"][0]
    there, other = f"{MODEL}/versions/{version}", f"{MODEL}/versions/1"
    assert server.get(there).json["versions"] == [version]
    for method, path, content in (
        ("GET", "", None),
        ("GET", "/ready", None),
        ("POST", "/infer", body((), (INPUTS,))),
        ("POST", "/adapt", body(data(1))),
    ):
        assert server.call(method, there + path, content).status == 200
        refused = server.call(method, other + path, content)
        assert refused.status == 404 and version in refused.json["error"]
    assert server.infer().json["model_version"] == version


class Nested(nn.Module):
    """Inputs that are a dict, or two tensors; outputs that are a dict of a tuple, and of no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = self.words(ids).mean(1) * scale[:, None]
        return {"logits": self.head(hidden), "more": (hidden, hidden.sum(1) > 0), "text": "none"}


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_nested_inputs_and_several_outputs(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    unroll = adaptrt.compile_unroll(
        model, adaptrt.optim.sgd(lr=0.1), 2, loss=lambda output, target: F.cross_entropy(output["logits"], target), backend="eager"
    )

    def some(size: int) -> Any:
        ids, scale = torch.randint(7, (size, 3)), torch.rand(size)
        return {"ids": ids, "scale": scale} if kind == "dict" else (ids, scale)

    support, query = (some(6), torch.arange(6) % 2), some(4)
    alone = Alone(unroll)
    with web.running(tmp_path, lambda: Built(Engine(unroll, (support, query), lanes=(1,)), (support, query))) as found:
        said = found.get(MODEL).json
        names = {
            "dict": ["support_0_ids", "support_0_scale", "support_1", "query_0_ids", "query_0_scale"],
            "tuple": ["support_0_0", "support_0_1", "support_1", "query_0", "query_1"],
        }[kind]
        assert [entry["name"] for entry in said["inputs"]] == names
        assert [(entry["name"], entry["datatype"], entry["shape"]) for entry in said["outputs"][:3]] == [
            ("output_0_logits", "FP32", [-1, 2]),
            ("output_0_more_0", "FP32", [-1, 4]),
            ("output_0_more_1", "BOOL", [-1]),
        ]
        values = [*(support[0].values() if isinstance(support[0], dict) else support[0]), support[1]]
        values += query.values() if isinstance(query, dict) else query
        sent = [web.entry(name, value) for name, value in zip(names, values, strict=True)]
        answer = found.call("POST", INFER, {"inputs": sent})
        torch.testing.assert_close(answer.tensor("losses"), torch.tensor(alone.adapt(support)))
        outputs = alone.predict(query)
        torch.testing.assert_close(answer.tensor("output_0_logits"), outputs["logits"])
        torch.testing.assert_close(answer.tensor("output_0_more_0"), outputs["more"][0])
        assert torch.equal(answer.tensor("output_0_more_1"), outputs["more"][1])
        missing = found.call("POST", INFER, {"inputs": sent[1:]})
        assert missing.status == 400 and names[0] in missing.json["error"]


def test_names_that_would_be_the_same() -> None:
    with pytest.raises(adaptrt.errors.InvalidType, match="the same name"):
        Form("query", {"a b": torch.zeros(2), "a_b": torch.zeros(2)})
    with pytest.raises(adaptrt.errors.InvalidType, match="complex"):
        Form("query", torch.zeros(2, dtype=torch.complex64))


# Keys and tokens


def routes_of(server: Running) -> list[tuple[str, str]]:
    version = server.get(MODEL).json["versions"][0]
    found = []
    for route in server.server.app.routes:
        path = route.path.replace("{model}", "model").replace("{version}", version)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {KEYS['ann']}",
        KEYS["ann"],
        f"Bearer {KEYS['ann'][:-1]}",
        "Bearer a.b.c",
        "Bearer \xff",
    ],
)
def test_every_route_is_closed_without_a_key(server: Running, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    routes = routes_of(server)
    assert len(routes) > 15 and ("GET", "/metrics") in routes and ("POST", LOAD) in routes
    for method, path in [
        *routes,
        ("GET", "/"),
        ("GET", "/nowhere"),
        ("GET", "/docs"),
        ("TRACE", "/v2"),
        ("OPTIONS", INFER),
        ("POST", "/v2/../metrics"),
    ]:
        answer = server.call(method, path, key=None, headers=headers)
        assert answer.status == 401, (method, path)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert method == "HEAD" or list(answer.json) == ["error"]


def test_roles(server: Running) -> None:
    for method, path in (("POST", LOAD), ("GET", "/metrics")):
        refused = server.call(method, path)
        assert refused.status == 403 and "operators" in refused.json["error"]
    for method, path, content in (("POST", ADAPT, body(data(1))), ("POST", INFER, body((), (INPUTS,))), ("DELETE", STATE, None)):
        assert server.call(method, path, content, key="ops").status == 403
    assert server.call("GET", "/v2/models/other").status == 404


def test_two_keys_in_one_request_are_refused(server: Running) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("GET", "/v2")
    for name in ("ann", "bob"):
        connection.putheader("Authorization", f"Bearer {KEYS[name]}")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_health_without_a_key_if_it_is_open(tmp_path: Path) -> None:
    with web.running(tmp_path, open_health=True, page=True) as found:
        for part in ("live", "ready"):
            assert found.get(f"/v2/health/{part}", None).status == 200
        assert found.get("/v2", None).status == 401
        assert found.call("GET", "/v2/health/live", key=None, headers={"Authorization": "Bearer no"}).status == 401
        for path in ("/", "/page/summary"):
            refused = found.get(path, None)
            assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Basic")

            def basic(text: str, path: str = path) -> int:
                value = base64.b64encode(text.encode()).decode()
                return found.call("GET", path, key=None, headers={"Authorization": f"Basic {value}"}).status

            assert basic(f"me:{KEYS['ann']}") == 403 and basic("me:no") == 401
            for value in ("Basic", "Basic !", "Basic \xe9", "Basic w7s=w7s=", "Basic gA=="):
                assert found.call("GET", path, key=None, headers={"Authorization": value}).status == 401
        summary = found.get("/page/summary", "ops").json
        assert summary["stage"] == "ready" and not [name for name in KEYS if f'"{name}"' in json.dumps(summary)]
        value = base64.b64encode(f"me:{KEYS['ops']}".encode()).decode()
        assert found.call("POST", LOAD, key=None, headers={"Authorization": f"Basic {value}"}).status == 401


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "ann")
    assert path.stat().st_mode & 0o777 == 0o600 and key not in path.read_text()
    path.write_text("# by hand\n\n" + path.read_text().rstrip("\n"))  # an editor that ends no line
    other = add_key(path, "ops", "operator")
    principals = Principals(read_keys(path))
    assert principals.of({"authorization": f"Bearer {key}"}) == ("ann", "tenant")
    assert principals.of({"authorization": f"bearer  {other} "}) == ("ops", "operator")
    for name, role in (
        ("", "tenant"),
        ("a b", "tenant"),
        ("a\u00a0b", "tenant"),
        ("#a", "tenant"),
        ("a\n", "tenant"),
        ("a", "king"),
        ("x" * 257, "tenant"),
    ):
        with pytest.raises((InvalidArgument, adaptrt.errors.InvalidType)):
            add_key(path, name, role)
    good = path.read_text()
    digest = "0" * 64
    for line in (
        "ann",
        "ann tenant",
        f"ann king {digest}",
        f"ann tenant {digest[1:]}",
        f"ann tenant {digest.replace('0', 'A')}",
        good.splitlines()[-1],
    ):
        path.write_text(f"{good}{line}\n")
        with pytest.raises(InvalidArgument, match="line 5"):
            read_keys(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_keys(path)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a key that nobody has. Digests are looked up by a hash with a secret, which is drawn anew for each server."""
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, two: compared.append((one, two)) or real(one, two))
    import hashlib

    keys = {hashlib.sha256(b"key").hexdigest(): web_principal("ann")}
    principals = Principals(keys, Tokens("s" * 32, "HS256"))
    for value in ("key", "other", "", "key\u00ff"):
        compared.clear()
        with contextlib.suppress(HTTPError):
            principals.of({"authorization": f"Bearer {value}"})
        assert len(compared) == 1 and compared[0][1] == hashlib.sha256(value.encode()).hexdigest()
    compared.clear()
    principals.of({"authorization": f"Bearer {token({'sub': 'ann'})}"})
    assert len(compared) == 1  # in PyJWT
    assert not set(principals._keys) & set(Principals(keys)._keys)


def web_principal(name: str) -> Any:
    from adaptrt.serve.web import Principal

    return Principal(name, "tenant")


_SECRET = "s" * 32


def token(claims: Mapping[str, Any], key: Any = _SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None) -> str:
    wanted = {"exp": int(time.time()) + 60, "aud": "us", "iss": "them", **claims}
    return jwt.encode({name: value for name, value in wanted.items() if value is not None}, key, algorithm, headers)


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    """A private and a public RSA key, in PEM."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    none = serialization.NoEncryption()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none).decode()
    public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem, public.decode()


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(head: Any, claims: Any, key: str = _SECRET) -> str:
    """A token with any parts, and an HMAC that is right."""
    text = f"{part(head)}.{part(claims)}"
    return f"{text}.{part(hmac.digest(key.encode(), text.encode(), 'sha256'))}"


@pytest.mark.parametrize("algorithm", ["HS256", "RS256"])
def test_tokens(pair: tuple[str, str], algorithm: str) -> None:
    private, public = pair
    sign, check = (_SECRET, _SECRET) if algorithm == "HS256" else (private, public)
    principals = Principals({}, Tokens(check, algorithm, "us", "them"))

    def of(text: str) -> Any:
        return principals.of({"authorization": f"Bearer {text}"})

    assert of(token({"sub": "ann"}, sign, algorithm)) == ("ann", "tenant")
    assert of(token({"sub": "ops", "role": "operator", "scope": "operator"}, sign, algorithm)) == ("ops", "tenant")
    now = int(time.time())
    refused: list[dict[str, Any]] = [
        {"exp": now - 1},
        {"exp": None},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"nbf": now + 60},
        {"iat": now + 60},
        {"aud": "others"},
        {"aud": None},
        {"aud": []},
        {"iss": "others"},
        {"iss": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "a\nb"},
        {"sub": "a\u0000"},
        {"sub": "a\u202eb"},
        {"sub": "x" * 257},
    ]
    for change in refused:
        with pytest.raises(HTTPError, match="not valid") as found:
            of(token({"sub": "ann", **change}, sign, algorithm))
        assert found.value.status == 401, change
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    claims = {"sub": "ann", "exp": now + 60, "aud": "us", "iss": "them"}
    texts = [
        token({"sub": "ann"}, "t" * 32) if algorithm == "HS256" else token({"sub": "ann"}, other, "RS256"),
        token({"sub": "ann"}, sign, algorithm, {"alg": algorithm, "crit": ["b64"]}),
        f"{part({'alg': 'none'})}.{part(claims)}.",
        f"{part({'alg': 'None', 'typ': 'JWT'})}.{part(claims)}.{part(b'')}",
        signed({"alg": "HS256", "typ": "JWT"}, claims, public),  # the public key as the secret of an HMAC
        signed({"alg": "HS512"}, claims),
        token({"sub": "ann"}, private, "RS256") if algorithm == "HS256" else token({"sub": "ann"}),
        "..",
        "a.b.c",
        f"{part(b'[' * 5000)}.{part(claims)}.x",
        f"{part(b'{}')}.{part(b'[' * 500)}.x",
        f"{part({'alg': 7})}.{part(claims)}.x",
        f"{part({'alg': algorithm, 'jku': 'http://127.0.0.1/', 'kid': '../../etc/passwd'})}.{part(claims)}.x",
        token({"sub": "ann"}, sign, algorithm) + "x" * 9000,
        token({"sub": "ann"}, sign, algorithm)[:-2],
    ]
    if algorithm == "HS256":
        texts += [
            signed({"alg": "HS256"}, b"[" * 3000),
            signed({"alg": "HS256"}, b'{"sub": "ann", "exp": 1e999}'),
            signed({"alg": "HS256"}, b'{"sub": "ann", "exp": ' + b"9" * 4400 + b"}"),
            signed({"alg": "HS256"}, [1]),
            signed({"alg": "HS256"}, {**claims, "sub": 7}),
            signed({"alg": "HS256"}, {**claims, "sub": {"a": 1}}),
            signed({"alg": "HS256"}, b'{"sub": "\\ud800", "exp": 99999999999, "aud": "us", "iss": "them"}'),
        ]
    for text in texts:
        with pytest.raises(HTTPError) as found:
            of(text)
        assert found.value.status == 401, text


@pytest.mark.parametrize("error", [RecursionError, OverflowError, UnicodeEncodeError("utf-8", "", 0, 1, "")])
def test_whatever_a_token_makes_the_parser_raise_is_401(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def decode(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(jwt, "decode", decode)
    with pytest.raises(HTTPError, match="not valid"):
        Principals({}, Tokens(_SECRET, "HS256")).of({"authorization": "Bearer a.b.c"})


def test_settings_of_tokens_that_cannot_be_right(pair: tuple[str, str]) -> None:
    for tokens in (
        Tokens("short", "HS256"),
        Tokens(_SECRET, "none"),
        Tokens(_SECRET, "RS256"),
        Tokens(pair[1][:40], "RS256"),
        Tokens("", "HS256"),
        Tokens(pair[1], "HS256"),  # anyone could sign with a public key
    ):
        with pytest.raises(InvalidArgument):
            Principals({}, tokens)


def test_a_server_without_keys_is_for_this_machine_alone(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "", "example.org", "10.0.0.1"):
        with pytest.raises(InvalidArgument, match="keys"):
            Server(builder(), Settings(host=host))
    with web.running(tmp_path, keys=None) as found:
        local = f"127.0.0.1:{found.port}"
        assert found.get("/v2", None).status == 200 and found.adapt(key=None).status == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": f"{local}.evil.example"}):
            assert found.call("POST", ADAPT, body(data(1)), key=None, headers=headers).status == 403
        assert found.call("GET", "/v2", key=None, headers={"Origin": f"http://{local}"}).status == 200


# Limits


def test_limits_of_bodies(tmp_path: Path) -> None:
    with web.running(tmp_path, limits=Limits(max_body_bytes=3000)) as found:
        assert found.adapt(key="bob").status == 200
        for content in (b"x" * 3001, body(data(1), parameters={"more": "x" * 3000})):
            refused = found.call("POST", ADAPT, content)
            assert refused.status == 413 and "3,000 bytes" in refused.json["error"] and "fewer examples" in refused.json["error"]
        packed = gzip.compress(b"x" * 3001)
        assert found.call("POST", ADAPT, packed, headers={"Content-Encoding": "gzip"}).status == 413
        refused = found.call("POST", ADAPT, b"{}", headers={"Content-Encoding": "br"})
        assert refused.status == 415 and "gzip" in refused.json["error"]
        for content, encoding in (
            (b"x", "gzip"),
            (gzip.compress(b"{}")[:-1], "gzip"),
            (zlib.compress(b"{}") + b"x", "deflate"),
            (b"", "gzip"),
        ):
            assert found.call("POST", ADAPT, content, headers={"Content-Encoding": encoding}).status == 400
        assert found.call("DELETE", STATE).json["forgotten"] is False


def test_limits_of_examples_steps_and_time(server: Running) -> None:
    refused = server.call("POST", ADAPT, body(data(1, 7)))
    assert refused.status == 400 and refused.json["error"] == "support data has 7 examples, and this server takes 6"
    refused = server.infer(torch.zeros(5, 3))
    assert refused.status == 400 and "takes 1 to 4" in refused.json["error"]
    refused = server.adapt(parameters={"steps": 3})
    assert refused.status == 400 and "2 steps" in refused.json["error"]
    assert server.adapt(parameters={"steps": 2}).status == 200
    server.forget("ann")
    for timeout in (-1, 1.5, "1", True, [1]):
        assert server.adapt(parameters={"timeout": timeout}).status == 400
    assert server.adapt(parameters={"timeout": 10**18}).status == 200
    assert server.adapt(parameters={"timeout": 10**400}).status == 400
    server.forget("ann")
    late = server.adapt(parameters={"timeout": 1})
    assert late.status == 504 and "nothing was done" in late.json["error"]
    assert server.call("DELETE", STATE).json["forgotten"] is False


@pytest.mark.parametrize(("limit", "message"), [("max_state_bytes", "the state of a tenant has"), ("max_steps", "the model makes 2 steps")])
def test_a_model_beyond_a_limit_is_not_served(tmp_path: Path, limit: str, message: str) -> None:
    found = Running(builder(), web.write_keys(tmp_path / "keys"), **{limit: 1})
    found.thread.join(60)
    assert not found.thread.is_alive() and message in str(found.server.failure)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_limit_of_tenants(tmp_path: Path, kind: str) -> None:
    store: Store = MemoryStore(2**20) if kind == "memory" else SQLiteStore(tmp_path / "tenants.db")
    with web.running(tmp_path, builder(store, max_tenants=2)) as found:
        assert [found.adapt(key=name).status for name in ("ann", "bob", "ann")] == [200, 200, 200]
        refused = found.adapt(key="cyd")
        assert refused.status == 403 and "no more tenants" in refused.json["error"]
        assert found.infer(key="cyd").status == 200 and found.call("POST", INFER, body(data(1), (INPUTS,)), key="cyd").status == 200
        found.forget("ann")
        assert [found.adapt(key=name).status for name in ("cyd", "ann")] == [200, 403]
    store.close()


class Held:
    """Holds an engine's compute thread before the next batch."""

    def __init__(self, engine: Engine) -> None:
        self.is_open, self.reached = threading.Event(), threading.Event()
        self._lanes = engine._core._lanes
        self._kept = {kind: getattr(self._lanes, kind) for kind in ("adapt", "predict")}
        for kind in self._kept:
            setattr(self._lanes, kind, self._through(kind))

    def _through(self, kind: str) -> Callable[..., Any]:
        def through(works: Any) -> Any:
            self.reached.set()
            assert self.is_open.wait(20)
            return self._kept[kind](works)

        return through

    def open(self) -> None:
        self.is_open.set()
        for kind, run in self._kept.items():
            setattr(self._lanes, kind, run)


class Calls:
    """Requests under way, each on a thread."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self._threads: list[threading.Thread] = []

    def start(self, call: Callable[[], Any], count: int = 1) -> None:
        for _ in range(count):
            self._threads.append(threading.Thread(target=lambda: self.answers.append(call())))
            self._threads[-1].start()

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.answers


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_limit_of_adaptations_of_one_tenant(tmp_path: Path) -> None:
    with web.running(tmp_path, limits=Limits(max_adaptations=2)) as found:
        held, calls = Held(found.engine), Calls()
        calls.start(found.adapt, 2)
        until(lambda: found.engine.stats().num_open == 2)
        refused = found.adapt()
        assert (
            refused.status == 429 and refused.headers["retry-after"] == "1" and refused.json["error"].startswith("2 adaptations of yours")
        )
        assert found.call("POST", INFER, body(data(1), (INPUTS,))).status == 429
        calls.start(lambda: found.adapt(key="bob"))
        until(lambda: found.engine.stats().num_open == 3)
        held.open()
        assert [answer.status for answer in calls.join()] == [200] * 3
        assert found.adapt().status == 200 and not found.server.app._adaptations


def test_a_full_queue(tmp_path: Path) -> None:
    with web.running(tmp_path, builder(max_queue=2, max_per_tenant=2)) as found:
        held, calls = Held(found.engine), Calls()
        calls.start(found.infer)
        assert held.reached.wait(20)
        calls.start(found.infer)
        until(lambda: found.engine.stats().num_open == 2)
        refused = found.infer()
        assert (
            refused.status == 429
            and refused.headers["retry-after"] == "1"
            and refused.json["error"] == "too many requests wait here; try again later"
        )
        calls.start(lambda: found.infer(key="bob"))
        until(lambda: found.engine.stats().num_open == 3)
        assert found.infer(key="cyd").status == 429
        held.open()
        assert [answer.status for answer in calls.join()] == [200] * 3


# Errors


def test_what_callers_are_told_of_the_engines_errors() -> None:
    """A status for each, and nothing of what the engine says to the one who wrote the server."""
    statuses = {
        "UnknownTenant": 404,
        "TooManyTenants": 403,
        "DeadlineExceeded": 504,
        "CommitConflict": 409,
        "NonFiniteInput": 400,
        "LabelOutOfRange": 400,
        "Overloaded": 429,
        "NotServing": 503,
        "StoreUnavailable": 503,
        "InvalidState": 409,
    }
    for name, kind in vars(adaptrt.errors).items():
        if isinstance(kind, type) and issubclass(kind, adaptrt.errors.AdaptrtError):
            found = web_errors.of_engine(kind("secret"))
            assert found.status == statuses.get(name, 400) and "secret" not in found.message and len(found.message) > 20


def test_a_mistake_of_the_server_is_told_as_json_and_logged_without_data(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    def broken(data: Any) -> Any:
        del data
        raise RuntimeError("secret of ann")

    server.engine._queries.fit, kept = broken, server.engine._queries.fit
    try:
        answer = server.call("POST", INFER, body((), (INPUTS,)), headers={"X-Request-Id": "id-7"})
    finally:
        server.engine._queries.fit = kept
    assert answer.status == 500 and answer.headers["x-request-id"] == "id-7"
    assert answer.json == {"error": "the server made a mistake; its log has more under the id id-7"}
    (record,) = [record for record in caplog.records if record.getMessage() == "a request failed"]
    line = JSONLines().format(record)
    assert "secret" not in line and "RuntimeError" in line and "in broken" not in line and "broken" in line
    assert server.infer().status == 200


def test_an_error_that_is_not_foreseen_is_logged_without_its_message(server: Running, lines: io.StringIO) -> None:
    """The caller can do nothing about it; who runs the server can."""

    async def adapt(*args: Any) -> Any:
        raise InvalidArgument("a state of 7,777 bytes does not fit into max_bytes=1; ann")

    server.engine.adapt = adapt  # type: ignore[method-assign]
    try:
        answer = server.adapt()
    finally:
        del server.engine.adapt
    assert answer.status == 400 and "metadata" in answer.json["error"] and "max_bytes" not in answer.json["error"]
    (line,) = [line for line in lines.getvalue().splitlines() if '"refused"' in line]
    assert '"InvalidArgument"' in line and "7,777" not in line


# Telemetry


def test_metrics_have_no_tenants(server: Running) -> None:
    server.adapt()
    server.infer()
    server.get("/v2/models/secret-name")
    server.get("/secret-path")
    text = server.get("/metrics", "ops").content.decode()
    assert 'adaptrt_http_request_seconds_count{route="adapt",status="200"}' in text
    assert 'route="none",status="404"' in text and 'adaptrt_stage{stage="ready"} 1.0' in text
    assert "adaptrt_engine_compiled_after_ready 0.0" in text
    assert "secret" not in text and "tenant" not in text
    assert not [name for name in KEYS if f'"{name}"' in text or KEYS[name] in text]
    from prometheus_client.parser import text_string_to_metric_families

    names = {label for family in text_string_to_metric_families(text) for sample in family.samples for label in sample.labels}
    assert names == {"event", "le", "requests", "route", "stage", "status"}


def test_counts_do_not_fall_when_a_new_version_takes_over(server: Running) -> None:
    loop = server.engine.loop
    assert loop is not None

    async def count() -> int:
        found = server.server.served.stats()
        assert found is not None
        return found.events["adapt"]

    def adapted() -> int:
        return asyncio.run_coroutine_threadsafe(count(), loop).result(20)

    server.adapt()
    before, seen = adapted(), []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(adapted())

    calls = Calls()
    calls.start(watch)
    assert server.call("POST", LOAD, key="ops").status == 200
    server.adapt()
    done.set()
    calls.join()
    assert seen == sorted(seen) and adapted() >= before + 2


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the server writes to its log, and uvicorn to its own."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JSONLines())
    loggers = [logging.getLogger(name) for name in ("adaptrt.serve", "uvicorn", "uvicorn.error", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield text
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_lines_of_the_log_have_no_data(server: Running, lines: io.StringIO) -> None:
    values = torch.full((6, 3), 0.123456789)
    support = (values, data(1)[1])
    server.call("POST", ADAPT, body(support, id="secret-id"), key="dee")
    server.call(
        "POST",
        INFER,
        body((), (values[:4],), parameters={"mine": "secret-parameter"}),
        key="dee",
        headers={"X-Forwarded-User": "secret-user"},
    )
    server.call("POST", ADAPT, body((values, data(1)[1] + 9)), key="dee")  # a label that does not exist
    server.call("POST", INFER, body((), (values,)), key="dee")  # too many
    server.call("POST", INFER, b'{"inputs": "secret-body"}', key="dee")
    server.call("GET", "/secret-path?secret=query", key="dee")
    server.call("GET", "/v2", key=None, headers={"Authorization": "Bearer secret-key"})
    server.call("POST", INFER, body((), (values[:4],), parameters={"timeout": 1}), key="dee")
    server.call("DELETE", STATE, key="dee")
    server.call("PROPFIND", "/v2", key="dee")
    until(lambda: '"_OTHER"' in lines.getvalue())  # methods are a few words
    text = lines.getvalue()
    found = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in found if line["event"] == "request"]
    assert [line["status"] for line in requests][:3] == [200, 200, 400]
    assert all(line.keys() >= {"time", "level", "route", "method", "status", "took_ms", "request_id"} for line in requests)
    for word in ("0.1234", "secret", "PROPFIND", "dee", KEYS["dee"], "query", "label"):
        assert word not in text.replace(web.__file__, ""), word


def test_spans_and_the_callers_trace(server: Running, monkeypatch: pytest.MonkeyPatch, lines: io.StringIO) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in ("app", "telemetry"):
        monkeypatch.setattr(f"adaptrt.serve.web.{module}.TRACER", provider.get_tracer("adaptrt.serve"))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    assert server.call("POST", ADAPT, body(data(1)), headers=headers, key="dee").status == 200
    until(lambda: len(exporter.get_finished_spans()) == 2)
    inner, outer = exporter.get_finished_spans()
    assert [inner.name, outer.name] == ["engine", "adapt"] and inner.parent is not None and outer.context is not None
    assert inner.parent.span_id == outer.context.span_id
    assert (
        f"{outer.context.trace_id:032x}" == trace_id and outer.parent is not None and f"{outer.parent.span_id:016x}" == "b7ad6b7169203331"
    )
    assert dict(outer.attributes or {}) == {"http.request.method": "POST", "http.route": "adapt", "http.response.status_code": 200}
    until(lambda: trace_id in lines.getvalue())
    exporter.clear()
    # An error of the engine, and a trace that is none.
    wrong = server.call("POST", ADAPT, body((data(1)[0], data(1)[1] + 9)), headers={"traceparent": "00-zz-1-01"}, key="dee")
    assert wrong.status == 400
    until(lambda: len(exporter.get_finished_spans()) == 2)
    assert not any(span.events for span in exporter.get_finished_spans())
    assert "dee" not in "".join(span.to_json() for span in exporter.get_finished_spans())


# Lifecycle


def test_starting_warming_ready_and_draining(tmp_path: Path) -> None:
    begin, may_warm = threading.Event(), threading.Event()
    good = builder()

    def build() -> Built:
        assert begin.wait(20)
        built = good()
        kept = built.engine._core.start

        async def start(warm: Callable[[], int]) -> None:
            def slowly() -> int:
                assert may_warm.wait(20)
                return warm()

            await kept(slowly)

        built.engine._core.start = start
        return built

    found = Running(build, web.write_keys(tmp_path / "keys"))
    try:
        for stage, go_on in ((Stage.STARTING, begin), (Stage.WARMING, may_warm)):
            found.wait(stage)
            assert found.get("/v2/health/live").status == 200
            refused = found.get("/v2/health/ready")
            assert refused.status == 503 and refused.json == {"ready": False, "stage": stage}
            for method, path, content in (
                ("GET", MODEL, None),
                ("GET", f"{MODEL}/ready", None),
                ("POST", ADAPT, body(data(1))),
                ("DELETE", STATE, None),
                ("GET", "/openapi.json", None),
            ):
                answer = found.call(method, path, content)
                assert answer.status == 503 and answer.headers["retry-after"] == "1" and stage in answer.json["error"]
            assert f'adaptrt_stage{{stage="{stage}"}} 1.0' in found.get("/metrics", "ops").content.decode()
            go_on.set()
        found.wait()
        assert found.adapt().status == 200
        # Draining: what is under way is answered, also a body that is not all there.
        held, calls = Held(found.engine), Calls()
        calls.start(found.adapt)
        assert held.reached.wait(20)
        slow = Slow(found.port, "bob")
        until(lambda: len(found.server.server_state.tasks) == 2)
        found.server.handle_exit(signal.SIGTERM, None)
        until(lambda: found.server.served.stage is Stage.DRAINING)
        with contextlib.suppress(OSError):
            assert found.infer().status == 503
        held.open()
        assert [answer.status for answer in calls.join()] == [200]
        assert slow.finish() == 200
    finally:
        begin.set()
        may_warm.set()
        found.stop()
    assert found.server.failure is None and found.engine_is_stopped()


class Slow:
    """A request to adapt of which the body comes in two parts."""

    def __init__(self, port: int, name: str, path: str = ADAPT, content: bytes | None = None) -> None:
        import http.client

        self._content = json.dumps(body(data(1))).encode() if content is None else content
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self.connection.putrequest("POST", path)
        self.connection.putheader("Authorization", f"Bearer {KEYS[name]}")
        self.connection.putheader("Content-Length", str(len(self._content)))
        self.connection.endheaders(self._content[:10])

    def finish(self) -> int:
        self.connection.send(self._content[10:])
        try:
            return self.connection.getresponse().status
        finally:
            self.connection.close()


def test_nothing_new_is_begun_while_it_drains(server: Running) -> None:
    server.adapt()
    server.server.served.stage = Stage.DRAINING
    try:
        for method, path, content in (("POST", ADAPT, body(data(1))), ("POST", INFER, body((), (INPUTS,))), ("DELETE", STATE, None)):
            answer = server.call(method, path, content)
            assert answer.status == 503 and "draining" in answer.json["error"]
        assert server.call("POST", LOAD, key="ops").status == 503
    finally:
        server.server.served.stage = Stage.READY
    assert server.call("DELETE", STATE).json["forgotten"] is True


def test_a_server_that_is_stopped_before_it_is_ready(tmp_path: Path) -> None:
    begin, good = threading.Event(), builder()

    def build() -> Built:
        assert begin.wait(20)
        return good()

    found = Running(build, web.write_keys(tmp_path / "keys"))
    found.wait(Stage.STARTING)
    found.server.stop()
    begin.set()
    found.stop()
    assert found.server.failure is None


def test_a_model_that_cannot_be_built_ends_the_server_with_its_error(tmp_path: Path) -> None:
    def build() -> Built:
        raise OSError("no such weights")

    server = Server(build, Settings(port=0, keys=web.write_keys(tmp_path / "keys")))
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            server.run_until_stopped()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and [str(error) for error in errors] == ["no such weights"]


def test_an_address_that_is_in_use(server: Running, tmp_path: Path) -> None:
    other = Server(builder(), Settings(port=server.port, keys=web.write_keys(tmp_path / "keys")))
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            other.run_until_stopped()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1
    assert isinstance(errors[0], InvalidArgument) and str(server.port) in str(errors[0]) and "cannot be listened on" in str(errors[0])


@pytest.mark.slow
def test_signals_of_a_process(tmp_path: Path) -> None:
    """SIGHUP has the keys read again; SIGTERM lets requests under way finish, and the process ends with 0."""
    with web.process(tmp_path) as found:
        found.wait_for_port()
        found.wait_until_ready()
        assert found.adapt().status == 200
        web.write_keys(tmp_path / "keys", ("bob", "ops"))
        found.process.send_signal(signal.SIGHUP)
        until(lambda: found.get("/v2").status == 401)
        assert found.get("/v2", "bob").status == 200
        (tmp_path / "keys").write_text("bob king\n")  # nothing is changed by a file that is wrong
        found.process.send_signal(signal.SIGHUP)
        until(lambda: "keys stay as they were" in found.log.read_text())
        assert found.get("/v2", "bob").status == 200
        slow = Slow(found.port, "bob")
        time.sleep(0.2)
        found.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):
            while found.infer(key="bob").status != 503:
                time.sleep(0.01)
        assert slow.finish() == 200
        assert found.process.wait(20) == 0
    lines = [json.loads(line) for line in found.log.read_text().splitlines() if not line.startswith("port")]
    assert not [line for line in lines if "exception" in line or (line["level"] == "error" and "keys" not in line["event"])]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("bad", 1), ("slow", 0)])
def test_the_end_of_a_process_that_does_not_become_ready(tmp_path: Path, kind: str, code: int) -> None:
    with web.process(tmp_path, kind) as found:
        if kind == "slow":
            found.wait_for_port()
            found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(90) == code
    text = found.log.read_text()
    assert "Traceback" not in text and ("this model cannot be built" in text) == (kind == "bad")


# New versions


class Load:
    """Tenants that adapt and predict all the time, each on a thread of its own, and what each was answered."""

    def __init__(self, server: Running, names: tuple[str, ...] = ("ann", "bob", "cyd", "dee")) -> None:
        self.answers: dict[str, list[tuple[str, int, web.Answer]]] = {name: [] for name in names}
        self._done = threading.Event()
        self._server = server
        self._calls = Calls()
        for name in names:
            self._calls.start(lambda name=name: self._run(name))

    def _run(self, name: str) -> None:
        found, number = self.answers[name], 0
        while not self._done.is_set():
            number += 1
            if number % 3 == 2:
                found.append(("infer", number, self._server.infer(data(number)[0][:4], key=name)))
            else:
                found.append(("adapt", number, self._server.adapt(number, key=name)))

    def wait_for(self, count: int) -> None:
        begin = {name: len(found) for name, found in self.answers.items()}
        until(lambda: all(len(found) >= begin[name] + count for name, found in self.answers.items()))

    def end(self) -> None:
        self._done.set()
        self._calls.join()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_new_versions_under_load(tmp_path: Path, kind: str) -> None:
    """No error, no answer of two versions; and with the same weights no adaptation is lost."""
    store: Store = MemoryStore(2**24) if kind == "memory" else SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
    seeds = iter([3, 4, 4, 3])
    with web.running(tmp_path, builder(store, seed=lambda: next(seeds), other_base="drop")) as found:
        load = Load(found)
        load.wait_for(4)
        versions = [found.get(MODEL).json["versions"][0]]
        for _ in range(3):
            versions.append(found.call("POST", LOAD, key="ops").json["model_version"])
            assert found.get(MODEL).json["versions"] == versions[-1:]
            load.wait_for(4)
        load.end()
        stats = found.server.served.stats()
    store.close()
    unrolls = {versions[0]: web.shared_unroll(3), versions[1]: web.shared_unroll(4)}
    assert versions == [versions[0], versions[1], versions[1], versions[0]] and versions[0] != versions[1]
    for answers in load.answers.values():
        assert [answer.status for _, _, answer in answers] == [200] * len(answers)
        seen, alone = "", Alone()
        for what, number, answer in answers:
            version = answer.json["model_version"]
            if version != seen:
                seen, alone = version, Alone(unrolls[version])  # states of another base are dropped
            if what == "adapt":
                torch.testing.assert_close(answer.tensor("losses"), torch.tensor(alone.adapt(data(number))), rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(answer.tensor("output_0"), alone.predict(data(number)[0][:4]), rtol=1e-4, atol=1e-5)
    assert (
        stats is not None and stats.events["adapt"] == sum(what == "adapt" for found in load.answers.values() for what, _, _ in found) + 4
    )


def test_states_of_another_base_are_refused_unless_they_are_to_be_dropped(tmp_path: Path) -> None:
    seeds = iter([3, 4])
    with web.running(tmp_path, builder(seed=lambda: next(seeds))) as found:
        assert found.adapt().status == 200
        assert found.call("POST", LOAD, key="ops").status == 200
        for answer in (found.infer(), found.adapt()):
            assert answer.status == 409 and "DELETE it" in answer.json["error"]
        assert found.infer(key="bob").status == 200
        assert found.call("DELETE", STATE).json["forgotten"] is True
        torch.testing.assert_close(found.adapt().tensor("losses"), torch.tensor(Alone(web.shared_unroll(4)).adapt(data(1))))


@pytest.mark.parametrize("kind", ["raises", "too large", "cannot start"])
def test_a_new_version_that_cannot_be_built_leaves_the_old_one(tmp_path: Path, kind: str, lines: io.StringIO) -> None:
    good, number = builder(), iter(range(9))

    def build() -> Built:
        if next(number) == 0:
            return good()
        if kind == "raises":
            raise OSError("/secret/path")
        if kind == "too large":
            example = data(0), INPUTS
            return Built(Engine(three_steps(), example, lanes=(1,)), example)
        built = good()
        built.engine._core._lanes._programs = None  # type: ignore[assignment]
        built.engine._programs = dataclasses  # type: ignore[assignment]
        return built

    with web.running(tmp_path, build, max_steps=2) as found:
        assert found.adapt().status == 200
        before, version = found.infer(), found.get(MODEL).json["versions"]
        refused = found.call("POST", LOAD, key="ops")
        assert refused.status == 500 and refused.json["error"].startswith("the new model cannot be built, and the old one serves on")
        assert "secret" not in refused.json["error"] and '"not loaded"' in lines.getvalue()
        assert found.get(MODEL).json["versions"] == version and found.infer().content == before.content
        assert found.adapt().status == 200 and found.server.served.stage is Stage.READY


def three_steps() -> Any:
    return adaptrt.compile_unroll(nn.Linear(3, 2).eval(), adaptrt.optim.sgd(lr=0.1), 3, loss=F.cross_entropy, backend="eager")


def test_requests_while_a_new_version_takes_over(tmp_path: Path) -> None:
    """A body that began under the old version is answered by the new one; only one version is loaded at a time."""
    seeds, go_on = iter([3, 4]), threading.Event()
    go_on.set()

    def seed() -> int:
        assert go_on.wait(20)
        return next(seeds)

    with web.running(tmp_path, builder(seed=seed)) as found:
        import gc
        import weakref

        old = weakref.ref(found.engine)
        slow = Slow(found.port, "ann")
        go_on.clear()
        calls = Calls()
        calls.start(lambda: found.call("POST", LOAD, key="ops"))
        until(lambda: found.server.served._loading.locked())
        refused = found.call("POST", LOAD, key="ops")
        assert refused.status == 409 and "being loaded already" in refused.json["error"]
        go_on.set()
        assert calls.join()[0].status == 200
        assert slow.finish() == 200
        gc.collect()
        assert old() is None


def test_a_load_that_the_end_of_the_server_overtakes(tmp_path: Path) -> None:
    """Nothing is left behind: neither the new engine nor its thread."""
    go_on, good, number = threading.Event(), builder(), iter(range(9))
    made: list[Engine] = []

    def build() -> Built:
        if next(number):
            assert go_on.wait(20)
        built = good()
        made.append(built.engine)
        return built

    with web.running(tmp_path, build) as found:
        calls = Calls()
        calls.start(lambda: found.call("POST", LOAD, key="ops"))
        until(lambda: found.server.served._loading.locked())
        found.server.handle_exit(signal.SIGTERM, None)
        go_on.set()
        assert calls.join()[0].status == 503
    assert [engine.stats().lifecycle for engine in made] == ["stopped", "stopped"]


# Imports


def test_the_library_does_without_the_server() -> None:
    import subprocess
    import sys

    code = (
        "import sys, adaptrt.serve; found = {name.split('.')[0] for name in sys.modules}; "
        "sys.exit(bool(found & {'starlette', 'uvicorn', 'prometheus_client', 'opentelemetry', 'jwt'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, env=dict(os.environ), check=False).returncode == 0
