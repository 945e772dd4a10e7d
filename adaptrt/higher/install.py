"""Makes `import higher` import `adaptrt.higher`, for libraries that import `higher` themselves and cannot be edited."""

from __future__ import annotations

import sys
from types import ModuleType

from adaptrt.errors import AlreadyImported

_OURS = "adaptrt.higher"
_THEIRS = "higher"

_replaced: dict[str, ModuleType] = {}
"""The modules of the original that `install(force=True)` replaced, by their names."""


def install(force: bool = False) -> None:
    """Makes `higher` and its submodules those of `adaptrt.higher`, in this process and for imports from now on.

    Calling it again has no effect. Processes that are spawned, not forked, must call it themselves.

    Args:
      force: go on if the original is imported already. Modules that have imported it keep what they have.
    Raises:
      AlreadyImported: the original is imported already.
    """
    theirs = {
        name: module for name, module in sys.modules.items() if module is not None and _is_within(name, _THEIRS) and not _is_ours(module)
    }
    if theirs and not force:
        raise AlreadyImported(
            "the original `higher` is imported already, and what has imported it would keep it. Call adaptrt.higher.install() before the "
            "first `import higher`, run the program by `python -m adaptrt.higher`, or call install(force=True)"
        )
    for name in theirs:
        _replaced[name] = sys.modules.pop(name)
    for name, module in list(sys.modules.items()):
        if _is_within(name, _OURS) and _is_ours(module):
            sys.modules[_THEIRS + name.removeprefix(_OURS)] = module


def uninstall() -> None:
    """Takes back what `install` did. Modules that have imported `higher` in between keep `adaptrt.higher`."""
    for name in [name for name, module in sys.modules.items() if _is_within(name, _THEIRS) and _is_ours(module)]:
        del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _is_ours(module: ModuleType) -> bool:
    return _is_within(getattr(module, "__name__", ""), _OURS)
