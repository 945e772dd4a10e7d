"""Servers that adapt and predict over HTTP, one a process: `python -m benchmarks.serving.apps SERVER MODEL PORT [KEYS]`.

All take the same request, of the Open Inference Protocol: support data and inputs. They adapt the same weights to it by the same steps,
predict, and keep nothing. `fastapi` and `litserve` are written as their documentation says, around a loop of `torch.autograd`: an endpoint
that is no coroutine, which FastAPI runs in its thread pool, and LitServe with its batches. `ours` is the engine behind HTTP, without a
guard.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.harness import CASES, Batch, Case, K

MODEL = "model"
LANES = (1, 8, 32)
MAX_DELAY_S = 0.002
DTYPES = {"FP32": torch.float32, "INT64": torch.int64}


def adapted(case: Case, support: Batch, inputs: Tensor) -> Tensor:
    """Adapts and predicts, eagerly.

    Each request has a copy of the model: `torch.func.functional_call` puts parameters into the module for a while, and threads share that.
    """
    x, y = support
    model = copy.deepcopy(case.model)
    params = list(model.parameters())
    for _ in range(K):
        gradients = torch.autograd.grad(case.loss(model(x), y), params)
        with torch.no_grad():
            for value, gradient in zip(params, gradients, strict=True):
                value -= case.lr * gradient
    with torch.no_grad():
        return model(inputs)


def tensors_of(request: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a request by name."""
    return {
        entry["name"]: torch.tensor(entry["data"], dtype=DTYPES[entry["datatype"]]).reshape(entry["shape"]) for entry in request["inputs"]
    }


def answer_of(output: Tensor) -> dict[str, Any]:
    """Returns an answer in the form of the protocol."""
    entry = {"name": "output_0", "shape": list(output.shape), "datatype": "FP32", "data": output.flatten().tolist()}
    return {"model_name": MODEL, "outputs": [entry]}


def fastapi(name: str, port: int) -> None:
    """Serves with FastAPI, a request a thread."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    case = CASES[name](backend="eager")

    class Named(BaseModel):
        name: str
        shape: list[int]
        datatype: str
        data: list[float]

    class Task(BaseModel):
        inputs: list[Named]

    app = FastAPI()

    def infer(task: Task) -> dict[str, Any]:
        found = tensors_of(task.model_dump())
        return answer_of(adapted(case, (found["support_0"], found["support_1"]), found["query_0"]))

    infer.__annotations__ = {"task": Task, "return": dict[str, Any]}  # FastAPI reads annotations, which are strings of local names here
    app.post("/infer")(infer)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def litserve(name: str, port: int) -> None:
    """Serves with LitServe, which makes batches."""
    from benchmarks.serving.in_litserve import serve

    serve(name, port, LANES[-1], MAX_DELAY_S)


def ours(name: str, port: int, keys: str) -> None:
    """Serves with adaptrt."""
    from adaptrt.serve import Engine
    from adaptrt.serve.web import Built, Server, Settings

    case = CASES[name]()
    example = case.supports[0], case.inputs

    def build() -> Built:
        return Built(Engine(case.unroll, example, lanes=LANES, max_delay_s=MAX_DELAY_S, keep=None), example)

    def ready() -> None:  # as `adaptrt serve` has it
        gc.collect()
        gc.freeze()

    Server(build, Settings(name=MODEL, port=port, keys=keys), ready=ready).run_until_stopped()


SERVERS: dict[str, Callable[..., None]] = {"ours": ours, "fastapi": fastapi, "litserve": litserve}


def main() -> None:
    """Serves until the process is told to end."""
    server, name, port, *keys = sys.argv[1:]
    torch.set_num_threads(1)
    SERVERS[server](name, int(port), *keys)


if __name__ == "__main__":
    main()
