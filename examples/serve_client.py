"""Adapts and predicts over HTTP with Triton's own client, which speaks to `make serve` as it does to a Triton server.

make serve                                         # in one terminal; it prints a key
python examples/serve_client.py --key KEY          # in another
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import tritonclient.http as triton


def tensors(path: Path) -> list[triton.InferInput]:
    """Returns the tensors in a file that `make serve` wrote."""
    found = []
    for entry in json.loads(path.read_text())["inputs"]:
        dtype = {"FP32": np.float32, "INT64": np.int64}[entry["datatype"]]
        tensor = triton.InferInput(entry["name"], entry["shape"], entry["datatype"])
        tensor.set_data_from_numpy(np.array(entry["data"], dtype).reshape(entry["shape"]))  # sent as bytes
        found.append(tensor)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", required=True, help="that make serve printed")
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--folder", type=Path, default=Path("build/serve"), help="with support.json and query.json")
    options = parser.parse_args()

    with triton.InferenceServerClient(options.url) as client:

        def ask(name: str, output: str) -> np.ndarray:
            headers = {"Authorization": f"Bearer {options.key}"}  # new each time, as the client writes into it
            found = client.infer(options.model, tensors(options.folder / name), headers=headers).as_numpy(output)
            assert found is not None
            return found

        before = ask("query.json", "output_0")
        losses = ask("support.json", "losses")  # support tensors alone adapt your state
        after = ask("query.json", "output_0")
    print("losses before each step:", losses.round(3))
    print("classes before adapting:", before.argmax(1))
    print("classes after adapting: ", after.argmax(1))


if __name__ == "__main__":
    main()
