"""An unroll as files that run without its Python code, and such files as an object with `adapt` and `predict`.

`write` writes a folder: programs in several formats, their weights, and a manifest that says everything a host must check. `load` reads
one. `formats` has one entry for each format.
"""

from adaptrt.export.exported import Exported, load

__all__ = ["Exported", "load"]
