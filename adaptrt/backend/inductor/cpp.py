"""Runs the C++ compiler with the flags that Inductor would give it.

Inductor writes its commands as text and takes them apart again, so that a folder with a space or a quote in its name breaks them. Here a
command is a list from the start, and the compiler runs in the folder of what it builds.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adaptrt.backend.inductor.sources import tag
from adaptrt.backend.inductor.store import Store
from adaptrt.process import waits

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
    settings = {name: value for name, value in config.save_config_portable(ignore_private_configs=False).items() if name.startswith("cpp.")}
    python = sysconfig.get_config_var("SOABI")
    return f"{tag()} {torch.__version__} {torch.version.git_version} {python} {isa} {isa.build_arch_flags()} {settings} {_processor()}"


@cache
def _processor() -> str:
    """The code is for the processor that it is compiled on (`-march=native`), and a folder may be shared with other machines."""
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
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        if not self._precompiles:
            return None
        flags = [flag for flag in self._flags if flag != "-shared"]

        def build(folder: Path) -> None:
            (folder / "prefix.h").write_text(f"#include <{_PREFIX}>\n", encoding="utf-8")
            _run([self._program, "-x", "c++-header", "prefix.h", *flags, "-o", "prefix.h.gch"], folder)

        try:
            # It is large, and the same for all folders of programs.
            store = Store(Path(default_cache_dir()) / "adaptrt")
            key = hashlib.sha256(f"{self._version} {torch.__version__} {flags} {_processor()}".encode()).hexdigest()[:40]
            return store.get_or_build(f"header-{key}", build) / "prefix.h"
        except (OSError, RuntimeError):
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
    found = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if not found.returncode:
        return
    output = found.stdout.decode(errors="replace")
    reasons = [line for line in output.splitlines() if any(text in line for text in _NOT_THE_SOURCE)]
    if found.returncode < 0 or reasons:
        raise CannotBuild(f"{command[0]} ended with status {found.returncode} {reasons[0] if reasons else ''}".strip())
    raise CppCompileError(list(command), output)
