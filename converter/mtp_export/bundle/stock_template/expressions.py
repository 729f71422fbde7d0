"""Expressions of a chat template as MiniJinja reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import nodes

from mtp_export.bundle.stock_template.filters import GENERATORS, written_filter, written_test
from mtp_export.bundle.stock_template.methods import literal, written_call
from mtp_export.bundle.stock_template.syntax import OF_MAPS, check_name, is_loop, is_text, refusal

_COMPARISONS = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
_OPERATORS: Mapping[type[nodes.BinExpr], str] = {
    nodes.Add: "+",
    nodes.Sub: "-",
    nodes.Mul: "*",
    nodes.Div: "/",
    nodes.FloorDiv: "//",
    nodes.Mod: "%",
    nodes.Pow: "**",
    nodes.And: "and",
    nodes.Or: "or",
}
_REFUSED_NAMES = frozenset(["varargs", "kwargs", "self", "cycler", "joiner", "lipsum", "now", "debug"])


class ExpressionWriter:
    """Writes any expression: one method for each kind of node in jinja2's tree, named by it."""

    def expression(self, node: nodes.Node) -> str:
        """Return an expression for MiniJinja.

        Raises:
            CheckpointError: there is no counterpart.
        """
        method = getattr(self, f"_as_{type(node).__name__.lower()}", None)
        if method is not None:
            text: str = method(node)
            return text
        if isinstance(node, nodes.BinExpr) and type(node) in _OPERATORS:
            if isinstance(node, nodes.Mod) and is_text(node.left):
                raise refusal(node, "the operator % on a text")
            operand = self.condition if isinstance(node, nodes.And | nodes.Or) else self.expression
            return f"({operand(node.left)} {_OPERATORS[type(node)]} {operand(node.right)})"
        raise refusal(node, f"the expression {type(node).__name__.lower()}")

    def condition(self, node: nodes.Node) -> str:
        """Return an expression whose truth counts, or that is an operand of `and` and `or`."""
        if isinstance(node, nodes.Filter) and node.name in GENERATORS:
            raise refusal(node, f"the filter {node.name!r} as a condition: add | list")
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value in OF_MAPS:
            # A key that a map lacks is its method in jinja2.
            value, owner = self.expression(node), self.expression(node.node)
            return f"({value} if {value} is defined else {owner} is mapping)"
        return self.expression(node)

    def text(self, node: nodes.Expr) -> str:
        """Return an expression as Python's str() of it."""
        written = self.expression(node)
        return written if is_text(node) else f"stock_text({written})"

    def _as_const(self, node: nodes.Const) -> str:
        return literal(node.value)

    def _as_templatedata(self, node: nodes.TemplateData) -> str:
        return literal(node.data)

    def _as_name(self, node: nodes.Name) -> str:
        if node.name in _REFUSED_NAMES or not node.name.isascii():
            raise refusal(node, f"the name {node.name}")
        check_name(node, node.name)
        return node.name

    def _as_getattr(self, node: nodes.Getattr) -> str:
        if node.attr in OF_MAPS:
            raise refusal(node, f".{node.attr} without a call")
        return f"{self.expression(node.node)}.{node.attr}"

    def _as_getitem(self, node: nodes.Getitem) -> str:
        return f"{self.expression(node.node)}[{self.expression(node.arg)}]"

    def _as_slice(self, node: nodes.Slice) -> str:
        if node.step is not None and (node.start is not None or node.stop is not None):
            raise refusal(node, "a slice with a step and an end")
        parts = [self.expression(part) if part is not None else "" for part in (node.start, node.stop)]
        return ":".join(parts) + (f":{self.expression(node.step)}" if node.step is not None else "")

    def _as_list(self, node: nodes.List) -> str:
        return f"[{', '.join(self.expression(item) for item in node.items)}]"

    _as_tuple = _as_list

    def _as_dict(self, node: nodes.Dict) -> str:
        pairs = (f"{self.expression(pair.key)}: {self.expression(pair.value)}" for pair in node.items)
        return f"{{ {', '.join(pairs)} }}"

    def _as_not(self, node: nodes.Not) -> str:
        return f"(not {self.condition(node.node)})"

    def _as_neg(self, node: nodes.Neg) -> str:
        return f"(-{self.expression(node.node)})"

    def _as_pos(self, node: nodes.Pos) -> str:
        return self.expression(node.node)

    def _as_concat(self, node: nodes.Concat) -> str:
        return f"({' ~ '.join(self.text(item) for item in node.nodes)})"

    def _as_condexpr(self, node: nodes.CondExpr) -> str:
        other = f" else {self.expression(node.expr2)}" if node.expr2 is not None else ""
        return f"({self.expression(node.expr1)} if {self.condition(node.test)}{other})"

    def _as_compare(self, node: nodes.Compare) -> str:
        parts, left = [], node.expr
        for operand in node.ops:
            parts.append(f"{self.expression(left)} {_COMPARISONS[operand.op]} {self.expression(operand.expr)}")
            left = operand.expr
        return f"({' and '.join(parts)})"

    def _as_test(self, node: nodes.Test) -> str:
        return written_test(self, node)

    def _as_filter(self, node: nodes.Filter) -> str:
        return written_filter(self, node)

    def _as_call(self, node: nodes.Call) -> str:
        if isinstance(node.node, nodes.Getattr) and not is_loop(node.node.node):
            return self._method(node, node.node.node, node.node.attr)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise refusal(node, "* or ** in a call")
        return f"{self.expression(node.node)}{self.arguments(node) or '()'}"

    def _method(self, node: nodes.Call, owner: nodes.Expr, name: str) -> str:
        value = self.expression(owner)
        arguments = [self.expression(argument) for argument in node.args]
        written = None if node.kwargs else written_call(name, value, arguments)
        if written is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise refusal(node, f"the method .{name}({', '.join('…' for _ in arguments)})")
        return written

    def arguments(self, node: Any) -> str:
        """Return the arguments of a call in parentheses, nothing if there are none."""
        written = [self.expression(argument) for argument in node.args]
        written += [f"{pair.key}={self.expression(pair.value)}" for pair in node.kwargs]
        return f"({', '.join(written)})" if written else ""
