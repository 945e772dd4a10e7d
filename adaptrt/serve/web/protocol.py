"""The Open Inference Protocol v2: tensors in the bodies of requests and answers, as JSON or as raw bytes behind a JSON header.

https://github.com/kserve/open-inference-protocol, with the binary extension of Triton's server: a header `Inference-Header-Content-Length`
gives the length of the JSON part, and each tensor with the parameter `binary_data_size` has as many bytes behind it, in the order in which
the tensors are listed, little-endian and row by row.

Known limits: no BYTES tensors, and no tensors in shared memory.
"""

from __future__ import annotations

import array
import ctypes
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import torch
from torch import Tensor

from adaptrt.serve.web.errors import HTTPError, Invalid

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_TENSORS = 1024
_MAX_NAME = 256
_MAX_NUMBERS = 2**48


class Datatype(NamedTuple):
    """A type of the protocol.

    Attributes:
      name: in the protocol.
      dtype: in PyTorch.
      code: of the `array.array` that reads numbers of JSON, and the dtype that this is in PyTorch.
    """

    name: str
    dtype: torch.dtype
    code: str
    read_as: torch.dtype


DATATYPES = (
    Datatype("BOOL", torch.bool, "B", torch.uint8),
    Datatype("UINT8", torch.uint8, "B", torch.uint8),
    Datatype("INT8", torch.int8, "b", torch.int8),
    Datatype("INT16", torch.int16, "h", torch.int16),
    Datatype("INT32", torch.int32, "i", torch.int32),
    Datatype("INT64", torch.int64, "q", torch.int64),
    Datatype("FP16", torch.float16, "f", torch.float32),
    Datatype("BF16", torch.bfloat16, "f", torch.float32),
    Datatype("FP32", torch.float32, "f", torch.float32),
    Datatype("FP64", torch.float64, "d", torch.float64),
)
_BY_NAME = {found.name: found for found in DATATYPES}
_BY_DTYPE = {found.dtype: found for found in DATATYPES}


class Wanted(NamedTuple):
    """An output that a request asks for by name, and whether as bytes; None for what the request says of all."""

    name: str
    binary: bool | None


class Request(NamedTuple):
    """The body of a request.

    Attributes:
      id: what the caller calls it, None for nothing.
      inputs: tensors by name.
      parameters: of the request.
      wanted: outputs to return, all if there are none.
      binary: whether outputs go as bytes.
    """

    id: str | None
    inputs: dict[str, Tensor]
    parameters: dict[str, Any]
    wanted: tuple[Wanted, ...]
    binary: bool


def datatype_of(dtype: torch.dtype) -> str:
    """Returns the protocol's name of a dtype.

    Raises:
      KeyError: it has none.
    """
    return _BY_DTYPE[dtype].name


def has_datatype(dtype: torch.dtype) -> bool:
    """Whether the protocol has this dtype."""
    return dtype in _BY_DTYPE


def decode(body: bytearray, header_length: str | None) -> Request:
    """Reads the body of a request. Tensors that were sent as bytes are copies.

    Args:
      body: all of it.
      header_length: the HTTP header of that name, None if there is none: then all is JSON.
    Raises:
      Invalid: it is not as the protocol says.
    """
    length = len(body) if header_length is None else _header_length(header_length, len(body))
    found = _json(body[:length] if length < len(body) else body)
    binary = _Bytes(body, length)
    inputs: dict[str, Tensor] = {}
    for entry in _list("inputs", found.get("inputs"), required=True):
        name, tensor = _input(entry, binary)
        if name in inputs:
            raise Invalid(f"input {name!r} is there twice")
        inputs[name] = tensor
    binary.require_all_taken()
    parameters = _mapping("parameters", found.get("parameters"))
    identity = found.get("id")
    if identity is not None and not (isinstance(identity, str) and len(identity) <= _MAX_NAME):
        raise Invalid(f"'id' must be a string of at most {_MAX_NAME} characters")
    wanted = tuple([_wanted(entry) for entry in _list("outputs", found.get("outputs"))])
    if len({entry.name for entry in wanted}) < len(wanted):
        raise Invalid("an output is asked for twice")  # a thousand times would be an answer a thousand times as long
    return Request(identity, inputs, parameters, wanted, _flag("binary_data_output", parameters) or False)


def require_outputs(request: Request, names: Sequence[str]) -> None:
    """Raises Invalid if a request wants other outputs than these. It is called before anything is done for the request."""
    for name, _ in request.wanted:
        if name not in names:
            raise Invalid(f"there is no output {_short(name)}, only {', '.join(names)}")


def encode(
    fields: Mapping[str, Any], outputs: Mapping[str, Tensor], request: Request, nullable: Sequence[str] = ()
) -> tuple[bytes, int | None]:
    """Writes the body of an answer.

    Args:
      fields: of the answer, besides its outputs and the id.
      outputs: all tensors that there are, by name.
      request: which says what of them is wanted.
      nullable: names of outputs that have null in JSON for NaN and infinity.
    Returns:
      The body, and the length of its JSON part where bytes follow it.
    Raises:
      HTTPError: an output holds NaN or infinity and is wanted as JSON, which has neither.
    """
    wanted = request.wanted or tuple([Wanted(name, None) for name in outputs])
    listed: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, is_binary in wanted:
        tensor = outputs[name]
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "datatype": datatype_of(tensor.dtype)}
        if request.binary if is_binary is None else is_binary:
            part = _to_bytes(tensor)
            parts.append(part)
            entry["parameters"] = {"binary_data_size": len(part)}
        else:
            values = tensor.reshape(-1).tolist()
            entry["data"] = [value if math.isfinite(value) else None for value in values] if name in nullable else values
        listed.append(entry)
    answer = {**fields, "outputs": listed} if request.id is None else {**fields, "id": request.id, "outputs": listed}
    try:
        header = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise HTTPError(422, "an output holds NaN or infinity, which JSON cannot carry; ask for it with binary_data") from None
    return (b"".join([header, *parts]), len(header)) if parts else (header, None)


class _Bytes:
    """The bytes behind the JSON part, which tensors take one after the other."""

    def __init__(self, body: bytearray, start: int) -> None:
        self._body = body
        self._at = start

    def take(self, name: str, size: int) -> memoryview:
        left = len(self._body) - self._at
        if size > left:
            raise Invalid(f"input {name!r} has binary_data_size {_short(size)}, and {left} bytes are left of the body")
        self._at += size
        return memoryview(self._body)[self._at - size : self._at]

    def require_all_taken(self) -> None:
        if self._at != len(self._body):
            raise Invalid(f"{len(self._body) - self._at} bytes of the body belong to no input; give each its binary_data_size")


def _header_length(text: str, num_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Invalid(f"{HEADER_LENGTH} must be a number of bytes")
    if int(text) > num_bytes:
        raise Invalid(f"{HEADER_LENGTH} is {int(text)}, and the body has {num_bytes} bytes")
    return int(text)


def _json(data: bytearray) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except (ValueError, RecursionError):
        raise Invalid(
            "the body, or the part of it that is to be JSON, cannot be read; NaN, infinity and integers of more than 64 bits are not in it"
        ) from None
    if not isinstance(found, dict):
        raise Invalid("the body must be a JSON object with 'inputs'")
    return found


def _input(entry: Any, binary: _Bytes) -> tuple[str, Tensor]:
    fields = _mapping("an input", entry, required=True)
    name = fields.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise Invalid(f"each input needs a 'name' of 1 to {_MAX_NAME} printable characters")
    datatype = _BY_NAME.get(fields["datatype"]) if isinstance(fields.get("datatype"), str) else None
    if datatype is None:
        raise Invalid(f"input {name!r} must have a datatype of {', '.join(_BY_NAME)}")
    shape = _list(f"shape of {name!r}", fields.get("shape"), required=True)
    if len(shape) > 64 or not all([type(size) is int and 0 <= size < 2**31 for size in shape]):
        raise Invalid(f"the shape of input {name!r} must be a list of at most 64 numbers, none negative")
    if math.prod([max(1, size) for size in shape]) > _MAX_NUMBERS:
        raise Invalid(f"the shape of input {name!r} is too large")  # for an empty tensor's strides, too
    parameters = _mapping(f"parameters of {name!r}", fields.get("parameters"))
    if any([key.startswith("shared_memory") for key in parameters]):
        raise Invalid(f"input {name!r} is in shared memory, which this server does not take; send its data")
    size = parameters.get("binary_data_size")
    if size is None:
        return name, _of_json(name, datatype, shape, fields.get("data"))
    if type(size) is not int or size < 0 or "data" in fields:
        raise Invalid(f"input {name!r} must have either 'data' or a binary_data_size of at least 0")
    return name, _of_bytes(name, datatype, shape, binary.take(name, size))


def _of_bytes(name: str, datatype: Datatype, shape: Sequence[int], data: memoryview) -> Tensor:
    num_bytes = math.prod(shape) * datatype.dtype.itemsize
    if num_bytes != len(data):
        raise Invalid(f"input {name!r} has {len(data)} bytes, and {num_bytes} are needed for {datatype.name} of the shape {_short(shape)}")
    if not num_bytes:
        return torch.empty(shape, dtype=datatype.dtype)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, which is aligned and which nobody else writes
    if datatype.dtype == torch.bool and int(raw.max()) > 1:
        raise Invalid(f"input {name!r} is BOOL, and has bytes other than 0 and 1")
    if sys.byteorder == "big":
        raw = raw.reshape(-1, datatype.dtype.itemsize).flip(1).reshape(-1)
    return raw.view(datatype.dtype).reshape(shape)


def _of_json(name: str, datatype: Datatype, shape: Sequence[int], data: Any) -> Tensor:
    flat = _flat(name, data, shape)
    kinds = set(map(type, flat))
    allowed = {bool} if datatype.dtype == torch.bool else {int, float} if datatype.dtype.is_floating_point else {int}
    if not kinds <= allowed:
        what = {frozenset({bool}): "true and false", frozenset({int}): "whole numbers"}.get(frozenset(allowed), "numbers")
        raise Invalid(f"input {name!r} is {datatype.name}, and must hold {what}")
    try:
        values = array.array(datatype.code, flat)
    except OverflowError:
        raise Invalid(f"input {name!r} holds a number that {datatype.name} does not have") from None
    if not values:
        return torch.empty(shape, dtype=datatype.dtype)
    return torch.frombuffer(values, dtype=datatype.read_as).to(datatype.dtype).reshape(shape)


def _flat(name: str, data: Any, shape: Sequence[int]) -> list[Any]:
    """Returns the numbers of nested lists, or of a flat one, in order."""
    if not isinstance(data, list):
        raise Invalid(f"input {name!r} needs 'data', a list of numbers")
    flat = data
    if len(shape) > 1 and data and isinstance(data[0], list):
        for depth, size in enumerate(shape[1:], 1):
            if len(flat) != math.prod(shape[:depth]) or not all([type(part) is list and len(part) == size for part in flat]):
                raise Invalid(f"the data of input {name!r} is not of the shape {_short(shape)}")
            flat = list(itertools.chain.from_iterable(flat))
    if len(flat) != math.prod(shape):
        raise Invalid(f"input {name!r} has {len(flat)} numbers, and {math.prod(shape)} are needed for the shape {_short(shape)}")
    return flat


def _wanted(entry: Any) -> Wanted:
    fields = _mapping("an output", entry, required=True)
    name = fields.get("name")
    if not isinstance(name, str):
        raise Invalid("each output needs a 'name'")
    parameters = _mapping("parameters of an output", fields.get("parameters"))
    if parameters.get("classification"):
        raise Invalid("classification is not served; ask for the output itself")
    if any([key.startswith("shared_memory") for key in parameters]):
        raise Invalid("outputs are not put into shared memory; leave it out")
    return Wanted(name, _flag("binary_data", parameters))


def _flag(name: str, parameters: Mapping[str, Any]) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise Invalid(f"the parameter {name} must be true or false")
    return value


def _list(what: str, value: Any, *, required: bool = False) -> list[Any]:
    if value is None and not required:
        return []
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise Invalid(f"'{what}' must be a list of at most {MAX_TENSORS} entries")
    return value


def _mapping(what: str, value: Any, *, required: bool = False) -> dict[str, Any]:
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise Invalid(f"{what} must be a JSON object")
    return value


def _to_bytes(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.reshape(-1, tensor.dtype.itemsize).flip(1).reshape(-1)
    return ctypes.string_at(raw.data_ptr(), raw.numel())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
