"""`adaptrt serve`, which serves a model over HTTP, and `adaptrt key`, which makes keys for those who may use it."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from adaptrt import load
from adaptrt.cli.targets import build as build_unroll
from adaptrt.cli.targets import fail, one_line_errors
from adaptrt.errors import InvalidArgument
from adaptrt.serve import Engine, MemoryStore, RedisStore, SQLiteStore, Store

if TYPE_CHECKING:
    from adaptrt.serve import web


def serve(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY|DIR", help="factory() returns (unroll, support, query); DIR is what export wrote.")
    ],
    name: Annotated[str, typer.Option(help="Of the model, in addresses.")] = "model",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of keys, made by 'adaptrt key'; SIGHUP has it read again.")] = None,
    jwt_key: Annotated[Path | None, typer.Option(help="File with the secret or public key that signs JSON Web Tokens.")] = None,
    jwt_algorithm: Annotated[str, typer.Option(help="HS256, RS256, ES256 or EdDSA, for example.")] = "HS256",
    jwt_audience: Annotated[str | None, typer.Option(help="That tokens must be for.")] = None,
    jwt_issuer: Annotated[str | None, typer.Option(help="That tokens must be from.")] = None,
    production: Annotated[bool, typer.Option("--production", help="Ask for keys in any case, and have no page.")] = False,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="A page at /; on unless in production.")] = None,
    open_health: Annotated[bool, typer.Option("--open-health", help="Tell health without a key, for an orchestrator's probes.")] = False,
    store: Annotated[str, typer.Option(help="memory, memory:BYTES, sqlite:PATH or redis://HOST:PORT/0.")] = "memory",
    ttl: Annotated[float | None, typer.Option(help="Seconds that a state lives after its last commit.")] = None,
    lanes: Annotated[str, typer.Option(help="Numbers of tasks in a batch, such as 1,4,16.")] = "",
    support_sizes: Annotated[str, typer.Option(help="Numbers of support examples; those of the example by default.")] = "",
    query_sizes: Annotated[str, typer.Option(help="Numbers of query examples.")] = "",
    keep: Annotated[str, typer.Option(help="The guard: not_worse, finite, none, or the largest norm of a change.")] = "not_worse",
    policy: Annotated[str, typer.Option(help="continual, episodic, reset_on_guard, reset_after:N or max_age_s:SECONDS.")] = "continual",
    unknown: Annotated[str, typer.Option(help="Predictions for tenants without a state: base or error.")] = "base",
    other_base: Annotated[str, typer.Option(help="States of another base: error or drop.")] = "error",
    max_delay_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits for more requests.")] = 2.0,
    max_queue: Annotated[int, typer.Option(min=1)] = 1024,
    max_tenants: Annotated[int | None, typer.Option(min=1, help="That may have a state.")] = None,
    max_adaptations: Annotated[int, typer.Option(min=1, help="Of one tenant at the same time.")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="With tensors, of one tenant at the same time.")] = 64,
    max_body_bytes: Annotated[int | None, typer.Option(min=1, help="Of a request; what the largest batch takes by default.")] = None,
    max_wait_s: Annotated[float, typer.Option(min=0.001, help="How long a request waits at most.")] = 30.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Inner steps that the model may make.")] = None,
    max_state_bytes: Annotated[int | None, typer.Option(min=1, help="How large the state of a tenant may be.")] = None,
    drain_s: Annotated[int, typer.Option(min=0, help="How long requests may take once SIGTERM came.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="That compute; one core is left for HTTP by default.")] = None,
) -> None:
    """Serve a model that adapts to each user, by the Open Inference Protocol v2."""
    with one_line_errors():
        try:
            from adaptrt.serve import web
        except ImportError as error:
            fail(str(error))
        if production and keys is None and jwt_key is None:
            fail("--production asks for --keys or --jwt-key; 'adaptrt key NAME' makes keys")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores - 1))
        held = _store(store, ttl)
        options: dict[str, Any] = {
            "lanes": _ints("lanes", lanes) or None,
            "keep": _keep(keep),
            "policy": _policy(policy),
            "store": held,
            "unknown": unknown,
            "other_base": other_base,
            "max_delay_s": max_delay_ms / 1e3,
            "max_queue": max_queue,
            "max_tenants": max_tenants,
        }
        sizes = _ints("support-sizes", support_sizes), _ints("query-sizes", query_sizes)
        settings = web.Settings(
            name=name,
            host=host,
            port=port,
            keys=None if keys is None else str(keys),
            tokens=None if jwt_key is None else web.Tokens(_read(jwt_key), jwt_algorithm, jwt_audience, jwt_issuer),
            page=not production if page is None else page,
            open_health=open_health,
            limits=web.Limits(max_body_bytes, max_adaptations=max_adaptations, max_requests=max_requests, max_wait_s=max_wait_s),
            max_state_bytes=max_state_bytes,
            max_steps=max_steps,
            drain_s=drain_s,
        )

        def ready() -> None:
            gc.collect()
            gc.freeze()  # docs/serving.md, "Garbage collection": this process is ours
            typer.echo(f"ready: {settings.url}")

        server = web.Server(_builder(target, sizes, options), settings, ready=ready)
        typer.echo(f"warming up {target}")
        web.log_to_stderr()
        try:
            server.run_until_stopped()
        finally:
            held.close()


def key(
    name: Annotated[str, typer.Argument(help="Of the tenant, or of the operator.")],
    file: Annotated[Path, typer.Option(help="The file of keys; only a hash goes into it.")] = Path("keys"),
    operator: Annotated[bool, typer.Option("--operator", help="For metrics, the page and loading, instead of a tenant's.")] = False,
) -> None:
    """Make a key, print it, and add its hash to the file that `adaptrt serve --keys` reads."""
    with one_line_errors():
        try:
            from adaptrt.serve import web
        except ImportError as error:
            fail(str(error))
        try:
            typer.echo(web.add_key(file, name, web.OPERATOR if operator else web.TENANT))
        except OSError as error:
            fail(f"{file} cannot be written: {error.strerror}")


def _builder(target: str, sizes: tuple[tuple[int, ...], tuple[int, ...]], options: dict[str, Any]) -> Callable[[], web.Built]:
    """Returns what makes an engine of an export, or of what a factory returns, which is called once here to find mistakes early."""
    from adaptrt.serve import web

    if not _is_folder(target):
        first: list[Any] = [build_unroll(target)]

        def of_factory() -> web.Built:
            unroll, support, query = first.pop() if first else build_unroll(target)
            if query is None:
                raise InvalidArgument(f"{target}() must return (unroll, support, query) to be served: the programs are for these shapes")
            example = support, query[0] if isinstance(query, tuple | list) else query
            return web.Built(Engine(unroll, example, support_sizes=sizes[0], query_sizes=sizes[1], **options), example)

        return of_factory

    def of_export() -> web.Built:
        exported = load(target)
        example = exported.example()
        of_support, of_query = sizes[0] or exported.num_examples("adapt"), sizes[1] or exported.num_examples("predict")
        return web.Built(Engine(exported, example, support_sizes=of_support, query_sizes=of_query, **options), example)

    return of_export


def _is_folder(target: str) -> bool:
    return Path(target).is_dir() or ":" not in target


def _store(text: str, ttl_s: float | None) -> Store:
    kind, _, rest = text.partition(":")
    if kind == "memory":
        if rest and not rest.isdecimal():
            raise InvalidArgument(f"--store {text}: write the bytes as a number, such as memory:1000000000")
        return MemoryStore(int(rest or 2**30), ttl_s)
    if kind == "sqlite" and rest:
        return SQLiteStore(rest, ttl_s)
    if kind in ("redis", "rediss", "unix"):
        return RedisStore(text, ttl_s)
    raise InvalidArgument(f"--store {text} is none; write memory, memory:BYTES, sqlite:PATH or redis://HOST:PORT/0")


def _ints(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", text):
        raise InvalidArgument(f"--{name} {text}: write numbers with commas between them, such as 1,4,16")
    return tuple([int(part) for part in text.split(",") if part])


def _keep(text: str) -> Any:
    if text in ("not_worse", "finite"):
        return text
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidArgument(f"--keep {text} is none; write not_worse, finite, none, or a number") from None


def _policy(text: str) -> Any:
    name, colon, bound = text.partition(":")
    if not colon:
        return text
    try:
        return name, int(bound) if name == "reset_after" else float(bound)
    except ValueError:
        raise InvalidArgument(f"--policy {text}: write a number behind the colon, such as {name}:10") from None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the key in {path} cannot be read: {error}") from error
