"""`make serve`, its curl lines, and the example with Triton's client, as a newcomer runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_what_it_prints_adapts_and_predicts(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    options = ["--folder", "served", "--minutes", "0.3", "--port", str(port), "--backend", "eager"]
    command = [sys.executable, "-m", "adaptrt.demo.serve", *options]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            printed: list[str] = []
            for line in server.stdout:
                printed.append(line)
                if line.startswith("["):
                    break
            text = "".join(printed)
            labels = torch.tensor(json.loads(printed[-1]))
            lines = [line for line in printed if line.startswith("curl ")]
            assert len(lines) == 3, text

            def ask(line: str) -> dict[str, torch.Tensor]:
                done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
                return {found["name"]: torch.tensor(found["data"]).reshape(found["shape"]) for found in json.loads(done.stdout)["outputs"]}

            before, adapted, after = map(ask, lines)
            right = [(found["output_0"].argmax(1) == labels).double().mean().item() for found in (before, after)]
            assert right[1] > max(0.5, right[0]) and adapted["kept"].all() and adapted["losses"][-1] < adapted["losses"][0]
            key = re.search(r"Bearer (\S+)'", lines[0])
            assert key is not None
            client = [sys.executable, str(ROOT / "examples" / "serve_client.py"), "--key", key[1], "--url", f"127.0.0.1:{port}"]
            done = subprocess.run(
                [*client, "--folder", "served"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0 and "classes after adapting" in done.stdout, done.stderr
        finally:
            server.send_signal(signal.SIGTERM)
            rest = server.stdout.read() if server.stdout is not None else ""
    assert server.returncode == 0, rest
    assert (tmp_path / "served" / "classifier.safetensors").is_file()
