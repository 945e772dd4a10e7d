"""`make serve`: serves the demo's classifier, which it meta-trains first if that was not done yet.

Prints three curl lines that predict, adapt, and predict again, for a task of classes that the classifier has never seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from adaptrt.demo import digits as protocol
from adaptrt.demo import learner
from adaptrt.demo.digits import Digits, Task
from adaptrt.demo.run import NUM_ITERATIONS, NUM_THREADS
from adaptrt.serve import Engine, web
from adaptrt.serve.web.protocol import datatype_of

NAME = "digits"
QUERIES = 5  # a class


def classifier(path: Path, minutes: float, backend: str, console: Console) -> nn.Module:
    """Returns the demo's classifier: the one in a file, or else one that is meta-trained now and written there."""
    model = learner.build_model(seed=0)
    if path.exists():
        load_model(model, path)
        return model
    console.print(f"meta-training a classifier for {path}, {minutes:g} minutes at most; the next start finds it there")
    unroll = learner.build_unroll(model, steps=learner.INNER_STEPS, backend=backend)
    deadline = time.monotonic() + 60 * minutes
    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task("meta-training", total=1.0)
        for progress in learner.meta_train(model, unroll, protocol.load(), seed=0, num_iterations=NUM_ITERATIONS, deadline=deadline):
            bar.update(shown, completed=progress.done, description=f"query loss {progress.loss:.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return model


def unseen_task(digits: Digits) -> Task:
    """Returns a task of five classes that were not trained on: five examples of each, and as many queries."""
    generator = torch.Generator().manual_seed(0)
    drawn = digits.draw(protocol.UNSEEN_CLASSES, generator, tasks=1, ways=learner.WAYS, shots=learner.SHOTS, queries=QUERIES)
    return drawn.tasks()[0]


def request(**tensors: Tensor) -> str:
    """Returns the body of a request with these tensors, as JSON."""
    inputs = [
        {"name": name, "shape": list(value.shape), "datatype": datatype_of(value.dtype), "data": _rounded(value)}
        for name, value in tensors.items()
    ]
    return json.dumps({"inputs": inputs})


def curl_lines(url: str, key: str, folder: Path) -> list[str]:
    """Returns the lines that predict, adapt, and predict again."""
    head = f"curl -s -H 'Authorization: Bearer {key}'"
    model = f"{url}/v2/models/{NAME}"
    send = "-d @" + os.path.relpath(folder)
    return [
        f"{head} {model}/infer {send}/query.json",
        f"{head} {model}/adapt {send}/support.json",
        f"{head} {model}/infer {send}/query.json",
    ]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/serve"), help="for the classifier, keys and bodies of requests")
    parser.add_argument("--minutes", type=float, default=2.0, help="of meta-training, if there is no classifier yet")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--backend", default="auto", choices=("auto", "inductor", "eager"), help="what runs the programs")
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    console = Console(highlight=False, soft_wrap=True)
    folder: Path = options.folder
    model = classifier(folder / "classifier.safetensors", options.minutes, options.backend, console)
    support, (inputs, labels) = unseen_task(protocol.load())
    (folder / "support.json").write_text(request(support_0=support[0], support_1=support[1]))
    (folder / "query.json").write_text(request(query_0=inputs))
    keys = folder / "keys"
    keys.unlink(missing_ok=True)  # what is printed now is valid for this run
    ann, operator = web.add_key(keys, "ann"), web.add_key(keys, "operator", web.OPERATOR)

    def build() -> web.Built:
        unroll = learner.build_unroll(model, steps=learner.INNER_STEPS, backend=options.backend)
        return web.Built(Engine(unroll, (support, inputs), lanes=(1, 4)), (support, inputs))

    settings = web.Settings(name=NAME, port=options.port, keys=str(keys), page=True)

    def show() -> None:
        console.print(f"\nready: {settings.url}, a page for the user 'operator' with the password {operator}\n")
        console.print("Predict before adapting, adapt to five examples of five unseen classes, and predict again:\n")
        for line in curl_lines(settings.url, ann, folder):
            console.print(line, "\n", markup=False)
        console.print(f"output_0 holds five scores for each of 25 images; the largest should be the one of its class:\n{labels.tolist()}\n")

    server = web.Server(build, settings, ready=show)
    console.print("compiling, about a minute")
    server.run_until_stopped()


def _rounded(value: Tensor) -> list[float]:
    numbers = value.flatten().tolist()
    return [round(number, 4) for number in numbers] if value.is_floating_point() else numbers


if __name__ == "__main__":
    main()
