"""Runs the C++ compiler with the flags that Inductor would give it.

Inductor writes its commands as text and takes them apart again, so that a folder with a space or a quote in its name breaks them. Here a
command is a list from the start, and the compiler runs in the folder of what it builds.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import sysconfig
from collections.abc import Generator, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adaptrt.backend.inductor.sources import tag
from adaptrt.backend.inductor.store import Store, only_ours
from adaptrt.process import after_fork, waits

_PREFIX = "torch/csrc/inductor/cpp_prefix.h"
"""What every kernel includes. It takes seconds to read, and is compiled once."""


class CannotBuild(OSError):
    """The compiler was stopped, or found no space. The source is not to blame."""


def key_of(source: str) -> str:
    """Names what is built of `source`. Nothing is asked of the compiler, which may be missing where all was built before."""
    return hashlib.sha256(f"{_surroundings()}\n{source}".encode()).hexdigest()[:40]


def _surroundings() -> str:
    """Everything besides the source that the compiled code depends on."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa: Any = pick_vec_isa()
    all_settings = config.save_config_portable(ignore_private_configs=False)
    settings = {name: value for name, value in all_settings.items() if name.startswith(_SETTINGS) and name not in _OF_SOURCES}
    python = sysconfig.get_config_var("SOABI")
    return f"{tag()} {torch.__version__} {torch.version.git_version} {python} {isa} {isa.build_arch_flags()} {settings} {_machine()}"


_SETTINGS = ("cpp.", "aot_inductor.")
"""Those that the flags of the C++ compiler depend on."""

_OF_SOURCES = ("cpp.threads", "cpp.max_horizontal_fusion_size")
"""Those that differ from program to program and only matter for what Inductor writes."""


def _machine() -> str:
    """A folder may be shared with other machines, and code for a newer C library does not run with an older one."""
    return f"{_processor()} {platform.libc_ver()}"


@cache
def _processor() -> str:
    """The code is for the processor that it is compiled on (`-march=native`)."""
    kinds = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return f"{platform.machine()} {[line for line in lines if line.startswith(kinds)]}"


class Compiler:
    """The C++ compiler and its flags, as Inductor's settings are when it is made.

    Raises:
      InvalidCxxCompiler: there is no compiler.
    """

    def __init__(self) -> None:
        from torch._inductor import config
        from torch._inductor.cpp_builder import CppTorchDeviceOptions, get_compiler_version_info, is_gcc
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        options: Any = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", include_pytorch=False, shared=True)
        self._program: str = options.get_compiler()
        self._is_gcc = is_gcc()
        self._flags = [
            *[f"-D{definition.strip()}" for definition in options.get_definitions()],
            *_split(f"-{flag}" for flag in options.get_cflags()),
            *[f"-I{folder}" for folder in options.get_include_dirs()],
            *_split(options.get_passthrough_args()),
            # Otherwise a library with a variable in a template could never be closed.
            *(["-fno-gnu-unique"] if self._is_gcc else []),
        ]
        self._at_the_end = [
            *_split(f"-{flag}" for flag in options.get_ldflags()),
            *[f"-l{library}" for library in options.get_libraries()],
            *[f"-L{folder}" for folder in options.get_libraries_dirs()],
        ]
        self._version: str = get_compiler_version_info(self._program)
        # Only GCC reads a compiled header that was moved since.
        self._precompiles: bool = config.cpp_cache_precompile_headers and self._is_gcc

    def build(self, source: str, folder: Path) -> None:
        """Makes `library.so` of a source, beside the source.

        Raises:
          CppCompileError: the compiler does not take the source.
          OSError: it could not run to its end.
        """
        (folder / "source.cpp").write_text(source, encoding="utf-8")
        header = self._header() if _PREFIX in source else None
        include = [] if header is None else ["-include", str(header)]
        _run([self._program, "source.cpp", *include, *self._flags, "-o", "library.so", *self._at_the_end], folder)

    def _header(self) -> Path | None:
        """The compiled header. None if it cannot be made: then each source reads the header's text."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

        if not self._precompiles:
            return None
        flags = [flag for flag in self._flags if flag != "-shared"]

        def build(folder: Path) -> None:
            (folder / "prefix.h").write_text(f"#include <{_PREFIX}>\n", encoding="utf-8")
            _run([self._program, "-x", "c++-header", "prefix.h", *flags, "-o", "prefix.h.gch"], folder)

        name = hashlib.sha256(f"{self._version} {torch.__version__} {flags} {_machine()}".encode()).hexdigest()[:40]
        name = f"header-{name}"
        # It is large, and the same for all folders of programs. But the default folder lies where others may have put something.
        shared = Path(default_cache_dir()) / "adaptrt"
        try:
            shared.mkdir(parents=True, exist_ok=True)
            if only_ours(shared):
                entry = Store(shared).get_or_build(name, build)
                if only_ours(entry, *entry.iterdir()):
                    return entry / "prefix.h"
        except (OSError, RuntimeError):
            pass
        with contextlib.suppress(OSError, RuntimeError):
            return Store(Path(cache_dir()) / "adaptrt").get_or_build(name, build) / "prefix.h"
        return None


def _split(parts: Iterable[str]) -> list[str]:
    """Flags of which some are several in one text. A path with a space is not taken apart."""
    return [flag for part in parts for flag in (shlex.split(part) if " -" in part else [part] if part else [])]


_NOT_THE_SOURCE = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
    "Permission denied",
    "Killed signal",
    "terminated with signal",
    "out of memory",
    "Cannot allocate memory",
)


@waits
def _run(command: Sequence[str], folder: Path) -> None:
    from torch._inductor.exc import CppCompileError

    # Temporary files go where they are removed with everything else if the process is killed.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    with _ended_with_us(
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # with which what it starts can be ended
        )
    ) as process:
        output = process.communicate()[0].decode(errors="replace")
    if not process.returncode:
        return
    reasons = [line for line in output.splitlines() if any(text in line for text in _NOT_THE_SOURCE)]
    if process.returncode < 0 or reasons:
        raise CannotBuild(f"{command[0]} ended with status {process.returncode} {reasons[0] if reasons else ''}".strip())
    raise CppCompileError(list(command), output)


_running: set[subprocess.Popen[bytes]] = set()
_ending = False


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Generator[subprocess.Popen[bytes]]:
    """A block in which a compiler runs. It does not go on when this process ends."""
    with process:
        _running.add(process)
        if _ending:
            _end_all()
        try:
            yield process
        except BaseException:
            _end(process)
            raise
        finally:
            _running.discard(process)


@atexit.register
def _end_all() -> None:
    global _ending
    _ending = True
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()


after_fork(_running.clear)  # they are the parent's
