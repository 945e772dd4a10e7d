"""The engine in LitServe: HTTP by LitServe, batches of concurrent requests by the engine.

    pip install 'adaptrt[litserve]'
    python examples/litserve_app.py --port 8000 --store tenants.db
    curl localhost:8000/predict -H 'Content-Type: application/json' -d '{"tenant": "ann", "x": [[0.1, 0.2], [0.3, 0.4]], "y": [0, 1]}'
    curl localhost:8000/predict -H 'Content-Type: application/json' -d '{"tenant": "ann", "x": [[0.1, 0.2], [0.3, 0.4]]}'

A request with `y` adapts the tenant, one without predicts. LitServe's own batches (`max_batch_size`) are not used: all rows of one would go
through the same model, while the engine's are of tenants with a model each. Every worker of LitServe has an engine, and LitServe gives a
request to any of them, so there is one; `adaptrt.serve.ray` has several, and sends each tenant to its own.
"""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

import argparse
import asyncio
import functools
from typing import Any

import litserve
import torch
import torch.nn.functional as F
from fastapi import HTTPException
from pydantic import BaseModel
from torch import nn

import adaptrt
from adaptrt.errors import AdaptrtError, DeadlineExceeded, InvalidArgument, InvalidType, Overloaded
from adaptrt.serve import Engine, MemoryStore, SQLiteStore

STATUS = {InvalidArgument: 400, InvalidType: 400, Overloaded: 429, DeadlineExceeded: 504, AdaptrtError: 503}


class Question(BaseModel):
    """What a request holds. LitServe reads the annotations when it starts, so this file does not postpone them."""

    tenant: str
    x: list[tuple[float, float]]
    y: list[int] | None = None


class Tenants(litserve.LitAPI):
    """Adapts a small network to the examples of each tenant."""

    store, backend = "", "inductor"

    def setup(self, device: str) -> None:
        """Compiles all programs, before LitServe opens its port."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device).eval()
        opt, loss = adaptrt.optim.adam(lr=0.05), functools.partial(F.cross_entropy, reduction="none")
        unroll = adaptrt.compile_unroll(model, opt, k=5, loss=loss, examples="weighted", backend=self.backend)
        x, y = torch.zeros(8, 2, device=device), torch.zeros(8, dtype=torch.long, device=device)
        store = SQLiteStore(self.store) if self.store else MemoryStore(2**28)
        self.engine = Engine(unroll, ((x, y), x), lanes=(1, 4, 16), store=store)
        self.engine.sync.start()  # on a thread with an event loop of its own

    async def decode_request(self, request: Question) -> tuple[str, Any, Any]:
        """Makes tensors of lists."""
        x = torch.tensor(request.x, dtype=torch.float32, device=self.device).reshape(-1, 2)
        return request.tenant, x, None if request.y is None else torch.tensor(request.y, dtype=torch.long, device=self.device)

    async def predict(self, question: tuple[str, Any, Any]) -> dict[str, Any]:
        """Adapts or predicts. Many of these calls wait at once, and the engine makes batches of them."""
        tenant, x, y = question
        call = self.engine.predict(tenant, x, deadline_s=5.0) if y is None else self.engine.adapt(tenant, (x, y), deadline_s=5.0)
        assert self.engine.loop is not None
        try:
            found: Any = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self.engine.loop))
        except AdaptrtError as error:
            raise HTTPException(next(code for kind, code in STATUS.items() if isinstance(error, kind)), str(error)) from error
        return {"logits": found.tolist()} if y is None else found._asdict()

    async def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Returns what JSON can write, which `output` is."""
        return output


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--store", default="", help="the path of a file that keeps states; without it they are gone at the end")
    parser.add_argument("--backend", default="inductor", help="'eager' starts at once")
    chosen = parser.parse_args()
    api = Tenants(enable_async=True)
    api.store, api.backend = chosen.store, chosen.backend
    server = litserve.LitServer(api, workers_per_device=1, timeout=10)
    server.run(host="127.0.0.1", port=chosen.port, generate_client_file=False)


if __name__ == "__main__":
    main()
