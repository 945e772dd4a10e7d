"""The web application: who asks, what for, and what they are answered. It speaks the Open Inference Protocol v2 and a few extensions.

A request passes `Application.__call__`, which finds out who sends it, has a route answer, and notes how that ended. Each route is one
function. No answer depends on another tenant's data, and none holds a word of what is inside the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from opentelemetry import trace
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from torch import Tensor

import adaptrt
from adaptrt.errors import AdaptrtError
from adaptrt.serve.web import bodies, errors, protocol
from adaptrt.serve.web.bodies import ClientGone
from adaptrt.serve.web.errors import HTTPError, Invalid
from adaptrt.serve.web.limits import Limits, UnderWay
from adaptrt.serve.web.model import KEPT, LOSSES, OUTPUT, Ready, Served, Stage
from adaptrt.serve.web.names import named
from adaptrt.serve.web.openapi import describe
from adaptrt.serve.web.principals import OPERATOR, TENANT, Principal, Principals
from adaptrt.serve.web.telemetry import LOG, TRACER, Telemetry, context_of

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Endpoint = Callable[["Call"], Awaitable[Response]]

EXTENSIONS = {
    "adapt": "POST /v2/models/{model}/adapt with support tensors adapts your state to them",
    "state": "DELETE /v2/models/{model}/state forgets your state",
    "adapt_and_infer": "infer with support and query tensors adapts the base, answers, and keeps nothing",
}
_SERVER_EXTENSIONS = ["binary_tensor_data", "model_repository", "adaptrt_adapt", "adaptrt_state"]
_HEALTH = ("/v2/health/live", "/v2/health/ready")
_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


@dataclasses.dataclass(slots=True)
class Call:
    """A request that a route answers.

    Attributes:
      http: the request.
      principal: who sends it.
      headers: names in lower case.
    """

    http: HTTPRequest
    principal: Principal
    headers: dict[str, str]


class Asked(NamedTuple):
    """What a request asks of an engine: tensors, and after how many seconds the answer is not wanted any more."""

    request: protocol.Request
    deadline_s: float


class Application:
    """The ASGI application of one model.

    Args:
      served: the model, which is started with the application and drained at its end.
      principals: who may send requests.
      limits: what they may ask for.
      page: whether there is a page at `/`.
      open_health: whether health is told without a key, as probes of an orchestrator ask.
      ready: called when the model is ready.
      failed: called if it cannot be started.
    """

    def __init__(
        self,
        served: Served,
        principals: Principals,
        limits: Limits | None = None,
        *,
        page: bool = False,
        open_health: bool = False,
        ready: Callable[[], object] = lambda: None,
        failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.served = served
        self.principals = principals
        self.telemetry = Telemetry(served)
        self._limits = limits or Limits()
        self._open = _HEALTH if open_health else ()
        self._is_started = ready
        self._failed = failed
        self._requests = UnderWay("requests", self._limits.max_requests)
        self._adaptations = UnderWay("adaptations", self._limits.max_adaptations)
        model, version = "/v2/models/{model}", "/versions/{version}"
        found: list[tuple[str, str, Endpoint]] = [
            ("GET", "/v2", self._server),
            ("GET", "/v2/health/live", self._live),
            ("GET", "/v2/health/ready", self._is_ready),
            *[("GET", model + part, self._model) for part in ("", version)],
            *[("GET", f"{model}{part}/ready", self._model_is_ready) for part in ("", version)],
            *[("POST", f"{model}{part}/infer", self._infer) for part in ("", version)],
            *[("POST", f"{model}{part}/adapt", self._adapt) for part in ("", version)],
            ("DELETE", f"{model}/state", self._forget),
            ("POST", "/v2/repository/models/{model}/load", self._load),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/metrics", self._metrics),
        ]
        if page:
            found += [("GET", path, self._page) for path in _PAGE_FILES]
            found.append(("GET", "/page/summary", self._summary))
        self._page_paths = {path for _, path, endpoint in found if endpoint in (self._page, self._summary)}
        self.routes = [Route(path, self._route(endpoint), methods=[method], name=_name(endpoint)) for method, path, endpoint in found]
        handlers = {HTTPError: _answer_error, HTTPException: _answer_http_exception}
        # Not Starlette(), whose own answer to a mistake is no JSON, and which takes a client that leaves for one.
        self._app = ExceptionMiddleware(Router(self.routes, redirect_slashes=False, lifespan=self._lifespan), handlers)

    async def __call__(self, scope: Scope, receive: bodies.Receive, send: Send) -> None:
        """Answers a request, as ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if len([name for name, _ in scope["headers"] if name.lower() == b"authorization"]) > 1:
            headers["authorization"] = ""  # whoever stands in front may have looked at another one than we
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        status = 499  # of a client that leaves

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message.get("headers", ())}
                more = [entry for entry in _HEADERS if entry[0] not in there]
                message["headers"] = [*message.get("headers", ()), *more, (b"x-request-id", request_id.encode())]
            await send(message)

        with TRACER.start_as_current_span("request", context=context_of(headers), kind=trace.SpanKind.SERVER) as span:
            try:
                await self._answer(scope, headers, receive, note)
            except ClientGone:
                status = 499
            except Exception as error:
                LOG.error("a request failed", extra={"fields": {"request_id": request_id, **_where(error)}})
                if status == 499:
                    status = 500
                    await _error(500, f"the server made a mistake; its log has more under the id {request_id}")(scope, receive, note)
            route = _name_of(scope)
            method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
            span.update_name(route)
            span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
            took_s = time.perf_counter() - began
            self.telemetry.answered(route=route, method=method, status=status, took_s=took_s, request_id=request_id)

    async def _answer(self, scope: Scope, headers: dict[str, str], receive: bodies.Receive, send: Send) -> None:
        try:
            path = scope["path"]
            if path in self._open and "authorization" not in headers:
                principal = Principal("", "")
            else:
                principal = self.principals.of(headers, basic=path in self._page_paths and scope["method"] == "GET")
        except HTTPError as error:
            await _error(error.status, error.message, error.headers)(scope, receive, send)
            return
        scope["adaptrt"] = principal, headers
        scope["app"] = self  # then Starlette's routes leave it to us to answer 404 and 405
        await self._app(scope, receive, send)

    def _route(self, endpoint: Endpoint) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        async def answer(http: HTTPRequest) -> Response:
            principal, headers = http.scope["adaptrt"]
            http.scope["adaptrt.route"] = _name(endpoint)
            if endpoint in self._of_operators and principal.role == TENANT:
                raise HTTPError(403, "this is for operators; use a key of one")
            if endpoint in self._of_tenants and principal.role == OPERATOR:
                raise HTTPError(403, "operators have no state; use a tenant's key")
            model = http.path_params.get("model")
            if model is not None and model != self.served.name:
                raise HTTPError(404, f"there is no such model; this server has {self.served.name!r}")
            try:
                return await endpoint(Call(http, principal, headers))
            except AdaptrtError as error:
                found = errors.of_engine(error)
                if found.status >= 500:
                    LOG.warning("refused", extra={"fields": {"error": type(error).__name__, "message": str(error)}})
                elif found.message == errors.CANNOT_COMPUTE:
                    LOG.warning("refused", extra={"fields": _where(error)})
                raise found from None

        return answer

    @property
    def _of_operators(self) -> tuple[Endpoint, ...]:
        return self._metrics, self._page, self._summary, self._load

    @property
    def _of_tenants(self) -> tuple[Endpoint, ...]:
        return self._infer, self._adapt, self._forget

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        del app
        starting = asyncio.create_task(self._start())
        try:
            yield
        finally:
            self.served.stage = Stage.DRAINING
            if not starting.done():
                starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self.served.drain()

    async def _start(self) -> None:
        try:
            await self.served.start()
            self._is_started()
        except BaseException as error:
            self._failed(error)
            raise

    async def _server(self, call: Call) -> Response:
        del call
        return JSONResponse({"name": "adaptrt", "version": adaptrt.__version__, "extensions": _SERVER_EXTENSIONS})

    async def _live(self, call: Call) -> Response:
        del call
        return JSONResponse({"live": True})

    async def _is_ready(self, call: Call) -> Response:
        del call
        is_ready = self.served.stage is Stage.READY
        return JSONResponse({"ready": is_ready, "stage": self.served.stage}, 200 if is_ready else 503)

    async def _model(self, call: Call) -> Response:
        return JSONResponse(_of_version(call, self.served.ready()).metadata(self.served.name, EXTENSIONS))

    async def _model_is_ready(self, call: Call) -> Response:
        return JSONResponse({"name": self.served.name, "ready": True, "version": _of_version(call, self.served.ready()).version})

    async def _infer(self, call: Call) -> Response:
        with self._requests.of(call.principal.name):
            body = await self._body(call)
            async with self.served.use() as ready:
                return await self._inferred(call, ready, self._decoded(call, ready, body))

    async def _inferred(self, call: Call, ready: Ready, asked: Asked) -> Response:
        engine, request, deadline_s = ready.engine, asked.request, asked.deadline_s
        tensors = request.inputs
        has_support, has_query = ready.support.is_in(tensors), ready.query.is_in(tensors)
        if has_support and not has_query:
            return await self._adapted(call, ready, asked)
        inputs = ready.query.build(tensors, engine.query_sizes)
        predicted = [entry["name"] for entry in ready.outputs]
        protocol.require_outputs(request, [*predicted, LOSSES, KEPT] if has_support else predicted)
        if not has_support:
            outputs = await self._unless_gone(call, engine.predict(call.principal.name, inputs, deadline_s))
            return self._response(ready, request, named(OUTPUT, outputs), {})
        support = ready.support.build(tensors, engine.support_sizes)
        with self._adaptations.of(call.principal.name):
            found = await self._unless_gone(call, engine.adapt_predict(support, inputs, deadline_s))
        tensors = {**named(OUTPUT, found.outputs), **_of_adaptation(found.losses, found.kept)}
        return self._response(ready, request, tensors, {"took_ms": round(1e3 * found.took_s, 3)})

    async def _adapt(self, call: Call) -> Response:
        with self._requests.of(call.principal.name):
            body = await self._body(call)
            async with self.served.use() as ready:
                asked = self._decoded(call, ready, body)
                if ready.query.is_in(asked.request.inputs):
                    raise Invalid(f"adapt takes support tensors alone, {', '.join(ready.support.names)}; send the query to infer")
                return await self._adapted(call, ready, asked)

    async def _adapted(self, call: Call, ready: Ready, asked: Asked) -> Response:
        support = ready.support.build(asked.request.inputs, ready.engine.support_sizes)
        protocol.require_outputs(asked.request, (LOSSES, KEPT))
        with self._adaptations.of(call.principal.name):
            outcome = await self._unless_gone(call, ready.engine.adapt(call.principal.name, support, asked.deadline_s))
        parameters = {"state_version": outcome.version, "took_ms": round(1e3 * outcome.took_s, 3)}
        return self._response(ready, asked.request, _of_adaptation(outcome.losses, outcome.kept), parameters)

    async def _forget(self, call: Call) -> Response:
        self.served.ready()
        async with self.served.use() as ready:
            was_there = await ready.engine.forget(call.principal.name)
        return JSONResponse({"model_name": self.served.name, "forgotten": was_there})

    async def _load(self, call: Call) -> Response:
        del call
        try:
            version = await self.served.load()
        except HTTPError:
            raise
        except Exception as error:
            LOG.error("not loaded", extra={"fields": {"message": str(error), **_where(error)}})
            raise HTTPError(500, "the new model cannot be built, and the old one serves on; the server's log says where") from None
        LOG.info("loaded", extra={"fields": {"version": version}})
        return JSONResponse({"model_name": self.served.name, "model_version": version})

    async def _openapi(self, call: Call) -> Response:
        del call
        return JSONResponse(
            describe(self.served.name, self.served.ready(), [(route.path, sorted(route.methods or ())) for route in self.routes])
        )

    async def _metrics(self, call: Call) -> Response:
        del call
        return Response(self.telemetry.metrics(), media_type="text/plain; version=0.0.4")

    async def _page(self, call: Call) -> Response:
        name, kind = _PAGE_FILES[call.http.scope["path"]]
        return Response((_PAGE / name).read_bytes(), media_type=kind)

    async def _summary(self, call: Call) -> Response:
        del call
        return JSONResponse({"model": self.served.name, **self.telemetry.summary()})

    async def _body(self, call: Call) -> bytearray:
        max_bytes = self._max_body_bytes(self.served.ready())
        return await bodies.read(call.http.receive, call.headers, max_bytes, self._limits.body_timeout_s)

    def _decoded(self, call: Call, ready: Ready, body: bytearray) -> Asked:
        """Reads what a request with tensors asks of an engine."""
        _of_version(call, ready)
        request = protocol.decode(body, call.headers.get(protocol.HEADER_LENGTH.lower()))
        names = [*ready.support.names, *ready.query.names]
        for name in request.inputs:
            if name not in names:
                raise Invalid(f"there is no input {name!r}, only {', '.join(names)}")
        k = ready.engine.k
        if request.parameters.get("steps", k) != k:
            raise Invalid(f"this model makes {k} steps; leave the parameter steps out")
        return Asked(request, self._limits.deadline_s(request.parameters.get("timeout")))

    def _max_body_bytes(self, ready: Ready) -> int:
        if self._limits.max_body_bytes is not None:
            return self._limits.max_body_bytes
        engine = ready.engine
        numbers = ready.support.num_numbers(engine.support_sizes.sizes[-1]) + ready.query.num_numbers(engine.query_sizes.sizes[-1])
        return 2**16 + 32 * numbers  # a number in JSON has some 20 characters

    async def _unless_gone(self, call: Call, answer: Coroutine[Any, Any, Any]) -> Any:
        """Waits for an engine's answer, and cancels it if the client leaves meanwhile."""
        # What an exception says may name a tenant.
        with TRACER.start_as_current_span("engine", record_exception=False, set_status_on_exception=False):
            task = asyncio.ensure_future(answer)
            gone = asyncio.ensure_future(_until_gone(call.http.receive))
            try:
                await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise ClientGone
                return task.result()
            finally:
                for part in (task, gone):
                    if not part.done():
                        part.cancel()
                await asyncio.gather(task, gone, return_exceptions=True)

    def _response(self, ready: Ready, request: protocol.Request, outputs: dict[str, Tensor], parameters: dict[str, Any]) -> Response:
        fields: dict[str, Any] = {"model_name": self.served.name, "model_version": ready.version}
        if parameters:
            fields["parameters"] = parameters
        # A state that was committed was; that a loss has no form in JSON must not make it look like a failure.
        body, header_length = protocol.encode(fields, outputs, request, nullable=(LOSSES,))
        if header_length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={protocol.HEADER_LENGTH: str(header_length)})


def _of_version(call: Call, ready: Ready) -> Ready:
    """Returns the engine. Raises HTTPError if the address names another version."""
    wanted = call.http.path_params.get("version")
    if wanted is not None and wanted != ready.version:
        raise HTTPError(404, f"there is no such version; this server has {ready.version!r}")
    return ready


async def _until_gone(receive: bodies.Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _of_adaptation(losses: tuple[float, ...], kept: bool) -> dict[str, Tensor]:
    return {LOSSES: torch.tensor(losses, dtype=torch.float32), KEPT: torch.tensor([kept])}


def _where(error: BaseException) -> dict[str, Any]:
    """Returns what the log says of an error: its type and where it was raised. Its message may hold data."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "where": places}


def _name(endpoint: Endpoint) -> str:
    return getattr(endpoint, "__name__", "route").strip("_")


def _name_of(scope: Scope) -> str:
    """Returns the name of the route that answered, which has no part of the address in it."""
    return scope.get("adaptrt.route", "none")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _answer_error(http: HTTPRequest, error: HTTPError) -> Response:
    del http
    return _error(error.status, error.message, error.headers)


async def _answer_http_exception(http: HTTPRequest, error: HTTPException) -> Response:
    del http
    messages = {404: "there is nothing at this address", 405: "this address does not take this method"}
    return _error(error.status_code, messages.get(error.status_code, "the request cannot be answered"), dict(error.headers or {}))
