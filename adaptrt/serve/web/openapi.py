"""The OpenAPI description of what a server takes and answers, made from its model and its routes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import adaptrt
from adaptrt.serve.web.model import Ready
from adaptrt.serve.web.protocol import DATATYPES, HEADER_LENGTH

_JSON = "application/json"
_BINARY = "application/octet-stream"
_SUMMARIES = {
    "/v2": "What the server is",
    "/v2/health/live": "Whether it runs",
    "/v2/health/ready": "Whether the model is ready",
    "/v2/models/{model}": "What the model takes and returns",
    "/v2/models/{model}/ready": "Whether the model is ready",
    "/v2/models/{model}/infer": "Predict with your state; with support tensors adapt the base for this answer alone",
    "/v2/models/{model}/adapt": "Adapt your state to support tensors",
    "/v2/models/{model}/state": "Forget your state",
    "/v2/repository/models/{model}/load": "Build the model anew, and serve that (operators)",
    "/openapi.json": "This description",
    "/metrics": "Metrics for Prometheus (operators)",
}
_ERRORS = {
    "400": "Something in the request is not as it must be",
    "401": "No valid key or token",
    "403": "Not for this role, or too many tenants",
    "404": "No such model or version, or no state",
    "408": "The body was too slow",
    "409": "The state is of another base, others committed meanwhile, or the model is being loaded",
    "413": "The body is too long",
    "415": "The body is packed in a way that is not read",
    "422": "An output has no form in JSON",
    "429": "Too much at once",
    "500": "The server made a mistake, or the new version cannot be built; its log says which",
    "503": "Not ready, or the store does not answer",
    "504": "The deadline passed",
}


def describe(name: str, ready: Ready, routes: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Returns the description.

    Args:
      name: of the model.
      ready: the model.
      routes: paths, with their methods.
    """
    paths: dict[str, dict[str, Any]] = {}
    for path, methods in routes:
        if path.startswith("/page") or path == "/":
            continue
        for method in methods:
            if method != "HEAD":
                paths.setdefault(path, {})[method.lower()] = _operation(path, method, name, ready)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"adaptrt: {name}", "version": adaptrt.__version__},
        "paths": paths,
        "security": [{"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}},
        },
    }


def _operation(path: str, method: str, name: str, ready: Ready) -> dict[str, Any]:
    known = path.replace("/versions/{version}", "")
    parameters = [
        {
            "name": part,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "enum": [{"model": name, "version": ready.version}[part]]},
        }
        for part in re.findall(r"{(\w+)}", path)
    ]
    answers: dict[str, Any] = {"200": {"description": "Done", "content": _content(known)}}
    for status, text in _ERRORS.items():
        answers[status] = {"description": text, "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    if known == "/v2/health/ready":
        answers["503"] = {"description": "Not ready", "content": {_JSON: {"schema": {"type": "object"}}}}
    found: dict[str, Any] = {"summary": _SUMMARIES[known], "operationId": _identity(method, path), "responses": answers}
    if known.endswith(("/infer", "/adapt")):
        parameters.append({"name": HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}})
        form = [*ready.support.metadata(optional=False), *([] if known.endswith("/adapt") else ready.query.metadata(optional=False))]
        binary = {"schema": {"type": "string", "format": "binary"}}
        found["requestBody"] = {"required": True, "content": {_JSON: {"schema": _request(form)}, _BINARY: binary}}
    if parameters:
        found["parameters"] = parameters
    return found


def _identity(method: str, path: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _content(path: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    if path.endswith(("/infer", "/adapt")):
        return {_JSON: {"schema": _answer()}, _BINARY: {"schema": {"type": "string", "format": "binary"}}}
    return {_JSON: {"schema": {"type": "object"}}}


def _request(form: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tensors = [
        {
            "type": "object",
            "required": ["name", "shape", "datatype"],
            "properties": {
                "name": {"const": entry["name"]},
                "datatype": {"const": entry["datatype"]},
                "shape": {
                    "type": "array",
                    "prefixItems": [{"type": "integer", "minimum": 0}, *[{"const": size} for size in entry["shape"][1:]]],
                    "minItems": len(entry["shape"]),
                    "maxItems": len(entry["shape"]),
                },
                "data": {"type": "array"},
                "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
            },
        }
        for entry in form
    ]
    output = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}}}
    parameters = {
        "timeout": {"type": "integer", "minimum": 0, "description": "Microseconds after which the answer is not wanted any more"},
        "binary_data_output": {"type": "boolean"},
        "steps": {"type": "integer"},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string", "maxLength": 256},
            "inputs": {"type": "array", "items": {"oneOf": tensors}},
            "outputs": {"type": "array", "items": output},
            "parameters": {"type": "object", "properties": parameters},
        },
    }


def _answer() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "datatype": {"enum": [found.name for found in DATATYPES]},
            "data": {"type": "array"},
        },
    }
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": tensor},
        },
    }
