"""The engine behind HTTP: the Open Inference Protocol v2, keys, limits, metrics and a page. `adaptrt serve` runs it.

It needs the extra `serve`; `import adaptrt.serve` does without.
"""

try:
    import opentelemetry.trace
    import prometheus_client
    import starlette
    import uvicorn
except ImportError as error:
    raise ImportError(f"the HTTP server needs the package {error.name}; pip install 'adaptrt[serve]'") from error

from adaptrt.serve.web.app import Application
from adaptrt.serve.web.limits import Limits
from adaptrt.serve.web.model import Built, Served, Stage
from adaptrt.serve.web.principals import OPERATOR, TENANT, Principal, Principals, Tokens, add_key, read_keys
from adaptrt.serve.web.server import Server, Settings, log_to_stderr

__all__ = [
    "OPERATOR",
    "TENANT",
    "Application",
    "Built",
    "Limits",
    "Principal",
    "Principals",
    "Served",
    "Server",
    "Settings",
    "Stage",
    "Tokens",
    "add_key",
    "log_to_stderr",
    "read_keys",
]

del opentelemetry, prometheus_client, starlette, uvicorn
