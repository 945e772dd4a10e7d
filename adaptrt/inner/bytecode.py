"""What the bytecode of a function says about its effects: which names it reads and sets, and which containers it may write into.

Everything is estimated from above: where the bytecode does not tell, a function counts as one that may read or write anything it names.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import functools
import itertools
import re
import types
from collections.abc import Sequence
from typing import Any

_READS_COMPUTED = frozenset(
    {"__dict__", "vars", "attrgetter", "methodcaller", "__getattribute__", "__getattr__", "eval", "exec", "locals"}
    | {"asdict", "astuple", "fields", "__dataclass_fields__", "getmembers"}
)
"""Names in code that may read attributes under names which it does not spell out, besides `getattr`."""

_SETS_COMPUTED = frozenset({"__setattr__", "__delattr__", "__dict__", "vars", "eval", "exec"})
"""The same of code that sets them, besides `setattr`."""

MUTATORS = frozenset(
    {"append", "appendleft", "extend", "extendleft", "insert", "pop", "popleft", "popitem", "remove", "clear", "sort", "reverse", "rotate"}
    | {"update", "setdefault", "add", "discard", "difference_update", "intersection_update", "symmetric_difference_update", "move_to_end"}
    | {"subtract", "fill", "put", "itemset", "resize", "frombytes", "fromlist", "__setitem__", "__delitem__", "__iadd__", "__ior__"}
)
"""Methods that change a container of the standard library or an array of NumPy's."""

_FUNCTIONS_THAT_MUTATE = frozenset(
    {"heappush", "heappop", "heapify", "heapreplace", "heappushpop", "insort", "insort_left", "insort_right"}
    | {"setitem", "delitem", "iadd", "ior", "iconcat", "copyto", "shuffle"}
)

_OF_CLASSES = frozenset(vars(builtins)) | {"deque", "OrderedDict", "defaultdict", "Counter", "UserDict", "UserList", "ChainMap"}
"""Names before a method that may be those of its class, so that the container itself is an argument: `dict.update(table, key=1)`."""

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_FIRST_IN_PLACE = 13
"""The operands of `BINARY_OP` from here on are those of `+=` and its like."""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a code object says.

    Attributes:
      names: what it names: global names, attributes, and strings that may be names.
      own_names: those of them that are global names or attributes, and variables of functions around it.
      globals: global names that it reads.
      imports: modules that it imports, each with the number of packages up from which it is looked for.
      reads: those of them that it reads other than to add a constant to them, and strings that may be names.
      reads_computed: whether it may read attributes under other names.
      sets: attributes that it sets.
      sets_computed: whether it may set attributes under other names.
      sets_globals: global names that it sets.
      sets_variables: variables that it sets of functions around it, or that functions in it use.
      globals_by_name: whether it may use global names that it does not spell out.
      writes_into: names of containers, attributes or variables, which it changes.
      writes_into_others: whether it changes a container that has come from elsewhere, such as a local variable.
    """

    names: frozenset[str]
    own_names: frozenset[str]
    globals: frozenset[str]
    imports: frozenset[tuple[int, str]]
    reads: frozenset[str]
    reads_computed: bool
    sets: frozenset[str]
    sets_computed: bool
    sets_globals: frozenset[str]
    sets_variables: frozenset[str]
    globals_by_name: bool
    writes_into: frozenset[str]
    writes_into_others: bool


@functools.lru_cache(maxsize=8192)
def facts(code: types.CodeType) -> Facts:
    """Reads a code object. Equal code objects have equal facts."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    used = frozenset(code.co_names)
    reads_others = any(_literal_names(steps, function)[1] for function in ("getattr", "hasattr"))  # literal ones are in `names`
    set_by_call, sets_others = _literal_names(steps, "setattr")
    deleted, deletes_others = _literal_names(steps, "delattr")
    into, into_others = _written_containers(steps)
    strings = frozenset([text for value in code.co_consts for text in _strings(value)])
    return Facts(
        names=used | strings,
        own_names=used | set(code.co_freevars) | set(code.co_cellvars),
        globals=frozenset([_of(step) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]),
        imports=frozenset([(_level(steps, index), _of(step)) for index, step in enumerate(steps) if step.opname == "IMPORT_NAME"]),
        reads=strings | {_of(step) for index, step in enumerate(steps) if _is_read(steps, index)},
        reads_computed=reads_others or bool(_READS_COMPUTED & used),
        sets=frozenset([_of(step) for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")]) | set_by_call | deleted,
        sets_computed=_initialises_again(steps) or sets_others or deletes_others or bool(_SETS_COMPUTED & used),
        sets_globals=frozenset([_of(step) for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME")]),
        sets_variables=frozenset([_of(step) for step in steps if step.opname in ("STORE_DEREF", "DELETE_DEREF")]),
        globals_by_name=bool({"globals", "eval", "exec"} & used),
        writes_into=into,
        writes_into_others=into_others or bool(_FUNCTIONS_THAT_MUTATE & used) or bool((MUTATORS | {"out"}) & strings),
    )


def line_of(code: types.CodeType, name: str) -> int | None:
    """The line in which a function sets an attribute or a variable of this name, if it does."""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF") and step.argval == name:
            return (step.positions.lineno if step.positions else None) or code.co_firstlineno
    return None


_NO_READS = ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME", "LOAD_CLOSURE", "MAKE_CELL")


def _is_read(steps: Sequence[dis.Instruction], index: int) -> bool:
    """Whether an instruction reads what it names, and not only to put it back with a constant added, as `self.calls += 1` does."""
    step = steps[index]
    if not isinstance(step.argval, str) or step.opname in _NO_READS or step.opname.startswith(("LOAD_FAST", "STORE_FAST", "LOAD_CONST")):
        return False
    after = [later for later in steps[index + 1 : index + 5] if later.opname != "SWAP"][:3]
    is_added = [later.opname for later in after[:2]] in (["LOAD_CONST", "BINARY_OP"], ["LOAD_SMALL_INT", "BINARY_OP"])
    is_put_back = len(after) == 3 and after[2].opname.startswith("STORE_") and after[2].argval == step.argval
    return not (is_added and is_put_back and after[1].argrepr == "+=" and not any(later.is_jump_target for later in after))


def _strings(value: Any) -> list[str]:
    """The strings in a constant that may be names, also those of a path like `"layer.weight"`."""
    if isinstance(value, str) and "{" in value:  # a format may name attributes
        return re.findall(r"[^\W\d]\w*", value)
    if isinstance(value, str):
        return [part for part in value.split(".") if part.isidentifier()] if len(value) < 200 else []
    return [text for entry in value for text in _strings(entry)] if isinstance(value, tuple | frozenset) else []


def _of(step: dis.Instruction) -> str:
    return str(step.argval)


def _effect(step: dis.Instruction) -> int:
    return dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)


def _level(steps: Sequence[dis.Instruction], index: int) -> int:
    level = steps[index - 2].argval if index > 1 else 0
    return level if isinstance(level, int) else 0


def _is_jump(step: dis.Instruction) -> bool:
    return step.is_jump_target or step.opcode in dis.hasjrel or step.opcode in dis.hasjabs


def _literal_names(steps: Sequence[dis.Instruction], function: str) -> tuple[frozenset[str], bool]:
    """The names with which code calls `getattr` or one of its like, and whether it may use others, too.

    The second argument is the one that is computed second on top of the function. Where it is a string of the code, a single instruction
    puts it there, and none replaces it before the call.
    """
    found: set[str] = set()
    for index, step in enumerate(steps):
        if step.argval == function and step.opname in _LOADS:
            name = _second_argument(steps[index + 1 :])
            if name is None:
                return frozenset(found), True
            found.add(name)
    return frozenset(found), False


def _second_argument(steps: Sequence[dis.Instruction]) -> str | None:
    height, name = 0, None
    for step in itertools.dropwhile(lambda step: step.opname == "PUSH_NULL", steps):
        if step.opname in ("PRECALL", "CALL") and step.arg == height:
            return name
        if _is_jump(step):
            return None
        before, height = height, height + _effect(step)
        if height == 2:
            name = step.argval if before == 1 and step.opname == "LOAD_CONST" and isinstance(step.argval, str) else None
        if height < 0:
            return None
    return None


def _written_containers(steps: Sequence[dis.Instruction]) -> tuple[frozenset[str], bool]:
    """The names of containers that code writes into, and whether it writes into others, too."""
    found: set[str | None] = set()
    for index, step in enumerate(steps):
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found.add(_below(steps, index, 1))
        elif step.opname == "STORE_SLICE":
            found.add(_below(steps, index, 2))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and step.argval in MUTATORS:
            name = _loaded(steps, index - 1)
            found.add(None if name in _OF_CLASSES else name)
        elif step.opname == "BINARY_OP" and (step.arg or 0) >= _FIRST_IN_PLACE:
            later = next((after for after in steps[index + 1 :] if after.opname not in ("SWAP", "COPY")), None)
            is_named = later is not None and later.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME")
            found.add(_of(later) if later is not None and is_named else None)
    return frozenset([name for name in found if name is not None]), None in found


def _initialises_again(steps: Sequence[dis.Instruction]) -> bool:
    """Whether code calls the constructor of an object that it names, as no constructor does of a derived class."""
    return any(
        step.argval in ("__init__", "__setstate__") and step.opname in ("LOAD_ATTR", "LOAD_METHOD") and _loaded(steps, index - 1)
        for index, step in enumerate(steps)
    )


def _below(steps: Sequence[dis.Instruction], index: int, num_above: int) -> str | None:
    """The name of the value that lies below `num_above` others on the stack when an instruction begins."""
    index -= 1
    for _ in range(num_above):
        height = 0
        while height < 1:
            if index < 0 or _is_jump(steps[index]):
                return None
            height += _effect(steps[index])
            index -= 1
        if height > 1:
            return None
    return _loaded(steps, index)


def _loaded(steps: Sequence[dis.Instruction], index: int) -> str | None:
    return _of(steps[index]) if index >= 0 and steps[index].opname in _LOADS else None


def names_in(path: str) -> set[str]:
    """The names in a path that code may use."""
    return {name for name in re.findall(r"[^\W\d]\w*", path) if not name.startswith("__")}


def last_names(path: str) -> set[str]:
    """The last attribute in a path like `model.config['sizes'][0]`, and the keys after it."""
    depth, begin = 0, 0
    for index, letter in enumerate(path):
        depth += (letter == "[") - (letter == "]")
        if letter == "." and not depth:
            begin = index + 1
    return names_in(path[begin:])
