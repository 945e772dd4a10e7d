"""Translates operations whose results depend, at each place, on the arguments at that place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx import channels
from adaptrt.export.onnx.writer import WIDER, Name, OneName, Operand, Refused, Rule, Value, Writer, promoted

aten = torch.ops.aten


def _unary(kind: str) -> OneName:
    def rule(write: Writer, like: Tensor, x: Operand) -> Name:
        wide = WIDER.get(like.dtype, like.dtype)
        found = write(kind, write.get(x, wide))
        return found if wide == like.dtype else write.cast(found, like.dtype)

    return rule


def _same_for_integers(kind: str) -> OneName:
    """Of a function that rounds."""

    def rule(write: Writer, like: Tensor, x: Operand) -> Name:
        return write(kind, write.get(x)) if like.is_floating_point() else write.get(x)

    return rule


def _binary(kind: str, of_bools: str | None = None) -> OneName:
    """Of an operation of two values; `of_bools` is the one for truth values."""

    def rule(write: Writer, like: Tensor, a: Operand, b: Operand, *, alpha: float = 1) -> Name:
        dtype = like.dtype
        if dtype == torch.bool:
            if of_bools is None or alpha != 1:
                raise Refused(" of bools")
            return write(of_bools, *_pair(write, like, a, b, dtype))
        if alpha == 1 and kind in _OF_CHANNELS:
            found = _OF_CHANNELS[kind](write, like.shape, a, b)
            if found is not None:
                return found
        wide = WIDER.get(dtype, dtype)
        left, right = _pair(write, like, a, b, wide)
        if alpha != 1:
            right = write("Mul", right, write.number(alpha, wide))
        found = write(kind, left, right)
        return found if wide == dtype else write.cast(found, dtype)

    return rule


_OF_CHANNELS = {"Mul": channels.product, "Add": channels.total, "Sub": channels.difference}
"""For each kind what writes it if one operand has a number for each channel of the other."""


def _multiplied(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
    found = _binary("Mul", "And")(write, like, a, b)
    write.products[found] = a, b
    return found


def _pair(write: Writer, like: Tensor, a: Operand, b: Operand, dtype: torch.dtype) -> tuple[Name, Name]:
    return write.get_broadcast(a, dtype, [b], like.shape), write.get_broadcast(b, dtype, [a], like.shape)


def _compared(kind: str, negated: bool = False) -> OneName:
    def rule(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
        dtype = promoted(a, b)
        dtype = torch.int32 if dtype == torch.bool else WIDER.get(dtype, dtype)
        found = write(kind, *_pair(write, like, a, b, dtype))
        return write("Not", found) if negated else found

    return rule


def _logical(kind: str) -> OneName:
    def rule(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
        return write(kind, *_pair(write, like, a, b, torch.bool))

    return rule


def _not(write: Writer, like: Tensor, x: Operand) -> Name:
    return write("Not", write.get(x, torch.bool))


def _bitwise_not(write: Writer, like: Tensor, x: Operand) -> Name:
    return write("Not" if like.dtype == torch.bool else "BitwiseNot", write.get(x))


def _chained(*kinds: str) -> OneName:
    """One function after another."""

    def rule(write: Writer, like: Tensor, x: Operand) -> Name:
        found = write.get(x, like.dtype)
        for kind in kinds:
            found = write(kind, found)
        return found

    return rule


def _relu(write: Writer, like: Tensor, x: Operand) -> Name:
    if like.is_floating_point():
        return write("Relu", write.get(x))
    return _binary("Max")(write, like, x, 0)


def _threshold_backward(write: Writer, like: Tensor, gradient: Value, x: Value, threshold: float) -> Name:
    """The gradient times 1 or 0: ONNX Runtime takes twenty times as long for a Where."""
    above = write("Greater", write.get(x), write.number(threshold, x.dtype))
    return write("Mul", write.get(gradient), write.cast(above, like.dtype))


def _pow(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
    if isinstance(a, Value) and not isinstance(b, Value) and b == 2:
        return _binary("Mul")(write, like, a, a)
    return _binary("Pow")(write, like, a, b)


def _sign(write: Writer, like: Tensor, x: Operand) -> Name:
    return write("Sign", write.get(x)) if like.dtype != torch.bool else write.get(x)


def _log_by(base: float) -> OneName:
    def rule(write: Writer, like: Tensor, x: Operand) -> Name:
        return write("Mul", write("Log", write.get(x, like.dtype)), write.number(1 / math.log(base), like.dtype))

    return rule


def _exp2(write: Writer, like: Tensor, x: Operand) -> Name:
    return write("Exp", write("Mul", write.get(x, like.dtype), write.number(math.log(2), like.dtype)))


def _log1p(write: Writer, like: Tensor, x: Operand) -> Name:
    """With u = 1 + x as it is rounded: log(u) * x / (u - 1), whose errors cancel for small x (Kahan; Goldberg 1991, theorem 4)."""
    dtype, value = like.dtype, write.get(x, like.dtype)
    one = write.number(1, dtype)
    u = write("Add", value, one)
    log = write("Log", u)
    small = write("Where", write("Equal", u, one), value, write("Mul", log, write("Div", value, write("Sub", u, one))))
    return write("Where", write("Greater", value, one), log, small)


def _expm1(write: Writer, like: Tensor, x: Operand) -> Name:
    """With u = exp(x) as it is rounded: (u - 1) * x / log(u), whose errors cancel for small x (Kahan)."""
    dtype, value = like.dtype, write.get(x, like.dtype)
    one = write.number(1, dtype)
    u = write("Exp", value)
    less = write("Sub", u, one)
    small = write("Where", write("Equal", u, one), value, write("Mul", less, write("Div", value, write("Log", u))))
    far = write("Greater", write("Abs", value), one)
    return write("Where", far, less, small)


def _gelu(write: Writer, like: Tensor, x: Operand, *, approximate: str = "none") -> Name:
    dtype, value = like.dtype, write.get(x)
    if approximate == "tanh":
        cube = write("Mul", write("Mul", value, value), value)
        inner = write("Add", value, write("Mul", cube, write.number(0.044715, dtype)))
        inner = write("Tanh", write("Mul", inner, write.number(math.sqrt(2 / math.pi), dtype)))
    else:  # in the order in which ONNX Runtime recognises it
        inner = write("Erf", write("Div", value, write.number(math.sqrt(2), dtype)))
    return write("Mul", write("Mul", value, write("Add", inner, write.number(1, dtype))), write.number(0.5, dtype))


def _where(write: Writer, like: Tensor, condition: Operand, a: Operand, b: Operand) -> Name:
    dtype, mask = like.dtype, write.get(condition, torch.bool)
    if dtype == torch.bool:
        one = write("And", mask, write.get(a, dtype))
        return write("Or", one, write("And", write("Not", mask), write.get(b, dtype)))
    wide = WIDER.get(dtype, dtype)
    left = write.get_broadcast(a, wide, [condition, b], like.shape)
    found = write("Where", mask, left, write.get_broadcast(b, wide, [condition, a], like.shape))
    return found if wide == dtype else write.cast(found, dtype)


def _clamp(write: Writer, like: Tensor, x: Operand, low: Operand | None = None, high: Operand | None = None) -> Name:
    dtype = like.dtype
    wide = WIDER.get(dtype, dtype)
    found = write.get(x, wide)
    for kind, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            found = write(kind, found, write.get(bound, wide))
    return found if wide == dtype else write.cast(found, dtype)


def _divided(write: Writer, like: Tensor, a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Name:
    dtype = like.dtype
    wide = WIDER.get(dtype, dtype)
    left, right = _pair(write, like, a, b, wide)
    if rounding_mode == "floor" and not like.is_floating_point():
        left = write("Sub", left, write("Mod", left, right))  # a multiple of the divisor
    found = write("Div", left, right)
    if like.is_floating_point() and rounding_mode is not None:
        found = write("Floor", found) if rounding_mode == "floor" else _truncated(write, found)
    return found if wide == dtype else write.cast(found, dtype)


def _truncated(write: Writer, name: Name) -> Name:
    return write("Mul", write("Sign", name), write("Floor", write("Abs", name)))


def _trunc(write: Writer, like: Tensor, x: Operand) -> Name:
    return _truncated(write, write.get(x)) if like.is_floating_point() else write.get(x)


def _remainder(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
    """The remainder with the sign of the divisor."""
    dtype = like.dtype
    wide = WIDER.get(dtype, dtype)
    left, right = _pair(write, like, a, b, wide)
    if not like.is_floating_point():
        found = write("Mod", left, right)
    else:  # ONNX's Mod of floats has the sign of the dividend
        rest = write("Mod", left, right, fmod=1)
        zero = write.number(0, dtype)
        other = write("And", write("Not", write("Equal", rest, zero)), write("Xor", write("Less", rest, zero), write("Less", right, zero)))
        found = write("Where", other, write("Add", rest, right), rest)
    return found if wide == dtype else write.cast(found, dtype)


def _fmod(write: Writer, like: Tensor, a: Operand, b: Operand) -> Name:
    """The remainder with the sign of the dividend."""
    wide = WIDER.get(like.dtype, like.dtype)
    found = write("Mod", *_pair(write, like, a, b, wide), fmod=1)
    return found if wide == like.dtype else write.cast(found, like.dtype)


def _is_nan(write: Writer, like: Tensor, x: Value) -> Name:
    if x.dtype.is_floating_point:
        return write("IsNaN", write.get(x))
    return write.full(False, torch.bool, like.shape)


def _is_inf(write: Writer, like: Tensor, x: Value) -> Name:
    if x.dtype.is_floating_point:
        return write("IsInf", write.get(x))
    return write.full(False, torch.bool, like.shape)


def _to_copy(write: Writer, like: Tensor, x: Operand, **options: Any) -> Name:
    del options
    return write.get(x, like.dtype)


def _both(packet: Any, rule: Rule) -> dict[Any, Rule]:
    """The rule for an operation of two tensors, and of a tensor and a number."""
    return {packet.Tensor: rule, packet.Scalar: rule}


def _table() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    unary: dict[str, Any] = {
        **{"Neg": aten.neg, "Exp": aten.exp, "Log": aten.log, "Sqrt": aten.sqrt, "Abs": aten.abs, "Reciprocal": aten.reciprocal},
        **{"Sin": aten.sin, "Cos": aten.cos, "Tan": aten.tan, "Asin": aten.asin, "Acos": aten.acos, "Atan": aten.atan},
        **{"Sinh": aten.sinh, "Cosh": aten.cosh, "Asinh": aten.asinh, "Acosh": aten.acosh, "Atanh": aten.atanh},
        **{"Tanh": aten.tanh, "Sigmoid": aten.sigmoid, "Erf": aten.erf},
    }
    for kind, packet in unary.items():
        rules[packet.default] = _unary(kind)
    for kind, packet in {"Floor": aten.floor, "Ceil": aten.ceil, "Round": aten.round}.items():
        rules[packet.default] = _same_for_integers(kind)
    for kind, of_bools, packet in (("Add", "Or", aten.add), ("Sub", None, aten.sub), ("Div", None, aten.div)):
        rules |= _both(packet, _binary(kind, of_bools))
    rules |= _both(aten.mul, _multiplied)
    for kind, of_bools, packet in (("Max", "Or", aten.maximum), ("Min", "And", aten.minimum)):
        rules[packet.default] = _binary(kind, of_bools)
    for kind, packet in (("And", aten.bitwise_and), ("Or", aten.bitwise_or), ("Xor", aten.bitwise_xor)):
        rules |= _both(packet, _binary(f"Bitwise{kind}", kind))
    for kind, packet in (("And", aten.logical_and), ("Or", aten.logical_or), ("Xor", aten.logical_xor)):
        rules[packet.default] = _logical(kind)
    for kind, packet in (("Less", aten.lt), ("LessOrEqual", aten.le), ("Greater", aten.gt), ("GreaterOrEqual", aten.ge)):
        rules |= _both(packet, _compared(kind))
    return {
        **rules,
        **_both(aten.eq, _compared("Equal")),
        **_both(aten.ne, _compared("Equal", negated=True)),
        **_both(aten.remainder, _remainder),
        **_both(aten.fmod, _fmod),
        **dict.fromkeys((aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar), _pow),
        **dict.fromkeys((aten.div.Tensor_mode, aten.div.Scalar_mode), _divided),
        aten.rsqrt.default: _chained("Sqrt", "Reciprocal"),
        aten.logical_not.default: _not,
        aten.bitwise_not.default: _bitwise_not,
        aten.relu.default: _relu,
        aten.sign.default: _sign,
        aten.threshold_backward.default: _threshold_backward,
        aten.log2.default: _log_by(2),
        aten.log10.default: _log_by(10),
        aten.log1p.default: _log1p,
        aten.exp2.default: _exp2,
        aten.expm1.default: _expm1,
        aten.gelu.default: _gelu,
        aten.where.self: _where,
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp,
        aten.trunc.default: _trunc,
        aten.isnan.default: _is_nan,
        aten.isinf.default: _is_inf,
        aten._to_copy.default: _to_copy,
    }


RULES = _table()
