"""Questions about the syntax tree that jinja2 makes of a template, and the refusal of what has no counterpart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

from jinja2 import nodes

from mtp_export.bundle.stock_template.methods import TEXT_METHODS
from mtp_export.errors import CheckpointError

PREFIX = "stock_"  # of names that helpers.jinja defines
OF_MAPS = frozenset(dir(dict))  # which jinja2 takes for attributes of a map
# Filters of texts that are the same in both, with their arguments.
TEXT_FILTERS: Mapping[str, tuple[str, ...]] = {
    "upper": (),
    "lower": (),
    "capitalize": (),
    "trim": ("chars",),
    "replace": ("old", "new"),
}


def is_text(node: nodes.Expr) -> bool:
    """Return whether an expression is certain to be a text."""
    match node:
        case nodes.Const():
            return isinstance(node.value, str)
        case nodes.TemplateData() | nodes.Concat():
            return True
        case nodes.Filter():
            return node.name in TEXT_FILTERS or node.name in ("string", "title", "join", "tojson")
        case nodes.Add():
            return is_text(node.left) or is_text(node.right)  # of a text and another kind there is no sum
        case nodes.CondExpr():
            return is_text(node.expr1) and (node.expr2 is None or is_text(node.expr2))
        case nodes.Call(node=nodes.Getattr(attr=name)):
            return name in TEXT_METHODS
    return False


def names_in(node: nodes.Node) -> Iterator[str]:
    """Yield the names in an expression."""
    if isinstance(node, nodes.Name):
        yield node.name
    for child in node.find_all(nodes.Name):
        yield child.name


def is_loop(node: nodes.Expr) -> bool:
    """Return whether an expression is jinja2's `loop`."""
    return isinstance(node, nodes.Name) and node.name == "loop"


def leaves_loop(node: nodes.Node) -> bool:
    """Return whether a statement may `continue` or `break` the loop that it stands in."""
    if isinstance(node, nodes.Continue | nodes.Break):
        return True
    if isinstance(node, nodes.For):
        return any(map(leaves_loop, node.else_))  # its own body leaves itself
    if isinstance(node, nodes.Macro | nodes.CallBlock):
        return False
    return any(leaves_loop(child) for child in node.iter_child_nodes())


def check_name(node: nodes.Node, name: str) -> None:
    """Check that a template's name is none of ours.

    Raises:
        CheckpointError: it is.
    """
    if name.startswith(PREFIX):
        raise refusal(node, f"the name {name}")


def check_apart(node: nodes.Node, values: Iterable[nodes.Node], names: Set[str]) -> None:
    """Check that values which jinja2 evaluates before any of `names` is set do not use these.

    Raises:
        CheckpointError: one does.
    """
    used = {name for value in values for name in names_in(value)}
    if used & names:
        raise refusal(node, f"the name {min(used & names)} in the value of another name beside it")


def refusal(node: nodes.Node, form: str) -> CheckpointError:
    """Return the error for a form of a template that MiniJinja has no counterpart of."""
    return CheckpointError(
        f"the chat template uses {form} in line {node.lineno}, which LiteRT-LM's renderer has no counterpart of: "
        "write it otherwise and give the file with --chat-template"
    )
