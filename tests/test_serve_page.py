"""The page of the server: it is for operators, and shows what the server says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptrt
from adaptrt.serve import Engine, web

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
PLAYWRIGHT = ROOT / "export" / "browser" / "node_modules" / "playwright-core"
SUPPORT = torch.randn(6, 3), torch.arange(6) % 2
INPUTS = torch.randn(4, 3)


class Site(NamedTuple):
    """A server with a page, and keys of a tenant and an operator."""

    url: str
    ann: str
    operator: str

    def get(self, path: str, key: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"})


def build() -> web.Built:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).eval()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    return web.Built(Engine(unroll, (SUPPORT, INPUTS), lanes=(1, 2)), (SUPPORT, INPUTS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    ann, operator = web.add_key(keys, "ann"), web.add_key(keys, "olga", web.OPERATOR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    is_ready = threading.Event()
    server = web.Server(build, web.Settings(port=port, keys=str(keys), page=True, name="toy"), ready=is_ready.set)
    thread = threading.Thread(target=server.run_until_stopped)
    thread.start()
    try:
        assert is_ready.wait(60)
        yield Site(server.settings.url, ann, operator)
    finally:
        server.stop()
        thread.join(60)


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/page/summary"])
def test_the_page_is_for_operators(site: Site, path: str) -> None:
    assert httpx.get(f"{site.url}{path}").status_code == 401
    assert site.get(path, site.ann).status_code == 403
    assert site.get(path, site.operator).status_code == 200
    assert httpx.get(f"{site.url}{path}", auth=("anyone", site.operator)).status_code == 200  # as browsers send it
    assert httpx.post(f"{site.url}/v2/repository/models/toy/load", auth=("anyone", site.operator)).status_code == 401


def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    policy = site.get("/", site.operator).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = "".join(site.get(path, site.operator).text for path in ("/", "/page.js", "/page.css"))
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # the name of SVG


def test_without_the_option_there_is_no_page() -> None:
    app = web.Application(web.Served("toy", build), web.Principals({}))
    assert [route.path for route in app.routes if not route.path.startswith("/v2")] == ["/openapi.json", "/metrics"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or not PLAYWRIGHT.is_dir(), reason="needs Chromium, and npm ci in export/browser")
def test_in_chromium(site: Site) -> None:
    tensors = [("support_0", SUPPORT[0], "FP32"), ("support_1", SUPPORT[1], "INT64")]
    body = {"inputs": [{"name": name, "shape": list(x.shape), "datatype": kind, "data": x.tolist()} for name, x, kind in tensors]}
    headers = {"Authorization": f"Bearer {site.ann}"}

    stopped = threading.Event()

    def load() -> None:
        while not stopped.is_set():
            httpx.post(f"{site.url}/v2/models/toy/adapt", headers=headers, json=body).raise_for_status()
            time.sleep(0.05)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        command = ["node", str(ROOT / "tests" / "serve_page.mjs"), site.url, site.operator]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "CHROMIUM": str(CHROMIUM)}
        )
    finally:
        stopped.set()
        thread.join()
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout)
    assert shown["faults"] == [] and shown["origins"] == [site.url]
    assert (shown["model"], shown["stage"], shown["compiled"], shown["routes"]) == (["toy"], ["ready"], ["0"], ["adapt"])
    assert shown["batches"][0] == "1" and int(shown["batches"][1]) > 0 and len(shown["points"].split()) >= 2
