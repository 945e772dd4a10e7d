"""The eager loop in LitServe, which reads the annotations of an API's methods, so that they must not be strings."""

# pyright: reportMissingImports=false

from typing import Any

import litserve
import torch
from torch import Tensor

from benchmarks.serving.apps import adapted, answer_of, tensors_of
from benchmarks.serving.harness import CASES


class Adapter(litserve.LitAPI):
    """Adapts and predicts; of a batch the loop runs each request for itself.

    Args:
      name: of the model.
      options: of LitServe.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name

    def setup(self, device: str) -> None:
        """Makes the model, in the process that LitServe starts."""
        del device
        torch.set_num_threads(1)
        self.case = CASES[self.name](backend="eager")

    def decode_request(self, request: dict[str, Any]) -> dict[str, Tensor]:
        return tensors_of(request)

    def batch(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return inputs

    def predict(self, found: list[dict[str, Tensor]]) -> list[Tensor]:
        return [adapted(self.case, (one["support_0"], one["support_1"]), one["query_0"]) for one in found]

    def unbatch(self, output: list[Tensor]) -> list[Tensor]:
        return output

    def encode_response(self, output: Tensor) -> dict[str, Any]:
        return answer_of(output)


def serve(name: str, port: int, max_batch_size: int, batch_timeout_s: float) -> None:
    """Serves with one process that computes."""
    api = Adapter(name, max_batch_size=max_batch_size, batch_timeout=batch_timeout_s, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
