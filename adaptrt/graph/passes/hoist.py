"""Moves what is the same in every step out of the step's graph, for example a frozen backbone on a support batch that all steps share.

Operations that depend only on inputs that stay the same become a graph of their own, which is run once. The step's graph takes its results
as inputs. A minimum cut decides which results these are, as in `partition`: cheap operations are computed again in each step if fewer bytes
have to be kept then.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from adaptrt.graph.cost import flops_of
from adaptrt.graph.cut import extract, minimum_cut, varying
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, apply
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.graph.signature import Input, Output, Role, Signature
from adaptrt.tree import Spec, flatten, tuple_of

MIN_FLOPS = 1_000_000
"""The fewest operations of products and convolutions that are worth moving. Fewer take about as long as the call of another program."""


def hoist(graph: Graph, same: Collection[int]) -> tuple[Graph, Graph] | None:
    """Splits a graph into (*args) -> shared, a list, and (*args, shared) -> results, or returns None if too little can be moved.

    Cotangents, the last argument of a pullback, are no argument of the first graph, and come after `shared` in the second.

    Args:
      graph: a function that is called several times.
      same: positions of the inputs that are the same in each call. Constants always are.
    """
    nodes = list(graph.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    inputs = list(zip(placeholders, graph.signature.inputs, strict=True))
    num_constants = len(graph.constants)
    split = len(inputs) - num_constants
    own = varying(graph, same)
    common = [node for node in nodes if node.op != "output" and node not in own]
    read = {node for node in common if any(user in own or user.op == "output" for user in node.users)}
    given = {node for node in common if node.op == "placeholder"}
    if flops_of(common) < MIN_FLOPS:
        return None
    cut = minimum_cut(common, given, read)
    if not cut:
        return None

    args, constants = inputs[:split], inputs[split:]
    before = [(node, entry) for node, entry in args if entry.role is not Role.COTANGENT]
    after = [(node, entry) for node, entry in args if entry.role is Role.COTANGENT]
    children = list(graph.arguments.children)
    of_cotangents = [children.pop()] if after else []
    shared = [(node, Input(f"shared.{index}", Role.KEPT, Spec.of(node.meta["val"]))) for index, node in enumerate(cut)]
    of_shared = flatten([node.meta["val"] for node in cut])[1]
    first = Graph(
        extract(graph, _nodes([*before, *constants]), cut),
        Signature(_entries([*before, *constants]), tuple(Output(entry.name, entry.spec, kept=True) for _, entry in shared)),
        graph.constants,
        tuple_of(children),
        of_shared,
        graph.history,
    )
    rest = [*before, *shared, *after, *constants]
    second = Graph(
        extract(graph, _nodes(rest), list(nodes[-1].args[0])),
        Signature(_entries(rest), graph.signature.outputs),
        graph.constants,
        tuple_of([*children, of_shared, *of_cotangents]),
        graph.result,
        graph.history,
    )
    passes = (Pass("hoist", lambda halved: halved), relax_views, own_outputs)
    return apply(passes, first), apply(passes, second)


def _nodes(pairs: list[tuple[fx.Node, Input]]) -> list[fx.Node]:
    return [node for node, _ in pairs]


def _entries(pairs: list[tuple[fx.Node, Input]]) -> tuple[Input, ...]:
    return tuple(entry for _, entry in pairs)
