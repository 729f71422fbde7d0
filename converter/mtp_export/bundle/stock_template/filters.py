"""Filters and tests of a chat template as MiniJinja has them. What a filter yields is the text of an expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2 import nodes

from mtp_export.bundle.stock_template.methods import WHITESPACE, literal
from mtp_export.bundle.stock_template.syntax import OF_MAPS, TEXT_FILTERS, refusal

# Filters of anything that are the same in both, without arguments.
_FILTERS = frozenset(["first", "last", "list", "reverse", "unique", "abs", "sum", "dictsort"])
APPLYING = {"map": 0, "select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}  # where the applied one's name is
_TESTS = frozenset(
    [
        *("defined", "undefined", "string", "mapping", "boolean", "integer", "float", "true", "false", "sameas"),
        *("even", "odd", "divisibleby", "in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan"),
        *("<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="),
    ]
)
GENERATORS = frozenset([*APPLYING, "reverse", "unique", "items"])  # true in jinja2, even without items


class Writer(Protocol):
    """Writes the expressions that a filter or test is applied to."""

    def expression(self, node: nodes.Node) -> str:
        """Return an expression for MiniJinja."""
        ...

    def text(self, node: nodes.Expr) -> str:
        """Return an expression as Python's str() of it."""
        ...

    def arguments(self, node: Any) -> str:
        """Return the arguments of a call in parentheses, nothing if there are none."""
        ...


def written_test(write: Writer, node: nodes.Test) -> str:
    """Return a test (`is …`); refuse one that has no counterpart."""
    value = write.expression(node.node)
    key = node.node.arg if isinstance(node.node, nodes.Getitem) else None
    if node.name in ("defined", "undefined") and isinstance(key, nodes.Const) and key.value in OF_MAPS:
        raise refusal(node, f"the test {node.name!r} of the key {key.value!r}")  # in jinja2 also an attribute
    match node.name:
        case "none":
            return f"({value} == none)"
        case "sequence":
            kinds = ("sequence", "string", "mapping", "undefined")
            return f"({' or '.join(f'{value} is {kind}' for kind in kinds)})"
        case "iterable":
            return f"({value} is iterable and {value} != none)"
        case "number":
            return f"({value} is number or {value} is boolean)"
    if node.name not in _TESTS:
        raise refusal(node, f"the test {node.name!r}")
    return f"({value} is {node.name}{write.arguments(node)})"


def written_filter(write: Writer, node: nodes.Filter) -> str:
    """Return an applied filter (`| …`); refuse one that has no counterpart."""
    if node.node is None:
        raise refusal(node, "a filter block")
    value = write.expression(node.node)
    match node.name:
        case "string":
            return write.text(node.node)
        case "trim" if not node.args and not node.kwargs:
            return f"({write.text(node.node)} | trim({literal(WHITESPACE)}))"
        case "title":
            return f"stock_title({write.text(node.node)})"
        case "length" | "count":
            return f"({value} | default([]) | length)"
        case "items":
            return f"({value} | default({{}}) | items)"
        case "join" if not node.kwargs and len(node.args) < 2:
            between = write.text(node.args[0]) if node.args else '""'
            return f"stock_join({value}, {between})"
        case "tojson":
            return f"stock_json({value}{_json_options(node)})"
        case "default" | "d":
            return _default(write, node)
        case "sort" if not node.args and {pair.key for pair in node.kwargs} <= {"reverse", "attribute"}:
            return f"({value} | sort{write.arguments(node)})"
        case name if name in TEXT_FILTERS:
            return f"({write.text(node.node)} | {name}{_positional(write, node, TEXT_FILTERS[name])})"
        case name if name in APPLYING:
            _check_applied(node)
            return f"({value} | {name}{write.arguments(node)})"
        case name if name in _FILTERS:
            return f"({value} | {name}{_positional(write, node, ())})"
    raise refusal(node, f"the filter {node.name!r}")


def _default(write: Writer, node: nodes.Filter) -> str:
    """LiteRT-LM's own filter gives an empty text for none."""
    arguments = dict(zip(("default_value", "boolean"), node.args, strict=False))
    arguments |= {str(pair.key): pair.value for pair in node.kwargs}
    default, boolean = arguments.pop("default_value", None), arguments.pop("boolean", None)
    if arguments or len(node.args) > 2 or not (boolean is None or isinstance(boolean, nodes.Const)):
        raise refusal(node, "the filter 'default' with other arguments")
    value = write.expression(node.node) if node.node is not None else ""
    other = literal("") if default is None else write.expression(default)
    if boolean is not None and boolean.value:
        return f"({value} or {other})"
    return f"({value} if {value} is defined else {other})"


def _positional(write: Writer, node: nodes.Filter, names: Sequence[str]) -> str:
    """Return a filter's arguments in their order, those that have names too."""
    values = [write.expression(argument) for argument in node.args]
    named = {str(pair.key): write.expression(pair.value) for pair in node.kwargs}
    rest = names[len(values) :]
    if len(values) > len(names) or not named.keys() <= set(rest[: len(named)]):
        raise refusal(node, f"the filter {node.name!r} with other arguments than {', '.join(names) or 'none'}")
    values += [named[name] for name in rest[: len(named)]]
    return f"({', '.join(values)})" if values else ""


def _check_applied(node: nodes.Filter) -> None:
    """`map` and its like apply filters and tests by name: those that are translated otherwise cannot be."""
    place = APPLYING[node.name]
    if {pair.key for pair in node.kwargs} - {"attribute"}:
        raise refusal(node, f"the filter {node.name!r} with {node.kwargs[0].key}")
    if len(node.args) <= place:
        return
    applied = node.args[place]
    allowed = {"upper", "lower", "first", "last"} if node.name == "map" else _TESTS
    if not isinstance(applied, nodes.Const) or applied.value not in allowed:
        raise refusal(node, f"the filter {node.name!r} with {getattr(applied, 'value', 'an expression')!r}")


def _json_options(node: nodes.Filter) -> str:
    """json.dumps's arguments for stock_json."""
    names = ("ensure_ascii", "indent", "separators", "sort_keys")
    arguments: dict[str, nodes.Expr] = dict(zip(names, node.args, strict=False))
    arguments |= {str(pair.key): pair.value for pair in node.kwargs}
    try:
        options = {name: value.as_const() for name, value in arguments.items()}
    except nodes.Impossible:
        raise refusal(node, "tojson with an argument that is no constant") from None
    if set(options) - set(names) or options.pop("ensure_ascii", False):
        raise refusal(node, "tojson with " + ", ".join(sorted(arguments)))
    indent, separators = options.get("indent"), options.get("separators")
    comma, colon = separators or (", " if indent is None else ",", ": ")
    written = {"step": " " * indent if isinstance(indent, int) else indent, "comma": comma, "colon": colon}
    written["sort_keys"] = bool(options.get("sort_keys"))
    return "".join(f", {name}={literal(value)}" for name, value in written.items())
