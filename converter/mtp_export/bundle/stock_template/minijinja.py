"""A chat template for jinja2 as one that MiniJinja, which LiteRT-LM renders with, turns into the same text.

jinja2 parses the template, with the options that transformers gives it, and its syntax tree is written anew: what
MiniJinja lacks (methods of maps and of most texts, `continue`, arguments of `tojson`) in terms of what it has, and what
it does otherwise (how `True` and `None` and lists are printed, the test `none`, which LiteRT-LM's build answers for
undefined values alone) by helpers.jinja. What has no counterpart is refused by name.

LiteRT-LM also rewrites calls of methods, such as `.strip()` and `.items()`, by patterns over a template's text, its
literals too, before it is parsed. So what is written here calls no method, and has no full stop in a literal.
Measured on litert-lm 0.18.1 and 0.19.0.dev20261026: docs/litert-lm.md has the table.
"""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_export.bundle.stock_template.methods import TEXT_METHODS, WHITESPACE, literal, written_call
from mtp_export.errors import CheckpointError
from mtp_runtime.text.chat import chat_environment

# Filters that do the same in both: of texts, with their arguments, and of anything, without.
_TEXT_FILTERS: Mapping[str, tuple[str, ...]] = {
    "upper": (),
    "lower": (),
    "capitalize": (),
    "trim": ("chars",),
    "replace": ("old", "new"),
}
_FILTERS = frozenset(["first", "last", "list", "reverse", "unique", "abs", "sum", "dictsort"])
_APPLYING = {"map": 0, "select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}  # where the applied one's name is
_TESTS = frozenset(
    [
        *("defined", "undefined", "string", "mapping", "boolean", "integer", "float", "true", "false", "sameas"),
        *("even", "odd", "divisibleby", "in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan"),
        *("<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="),
    ]
)
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
_OF_MAPS = frozenset(dir(dict))  # which jinja2 takes for attributes of a map
_GENERATORS = frozenset([*_APPLYING, "reverse", "unique", "items"])  # true in jinja2, whatever they have
_REFUSED_NAMES = frozenset(["varargs", "kwargs", "self", "cycler", "joiner", "lipsum", "now", "debug"])
_SWITCHES = ("is_appending_to_prefill",)
_PREFIX = "stock_"  # of names that helpers.jinja defines


def helpers() -> str:
    """The macros that a translated template calls, in MiniJinja."""
    return unindented("helpers.jinja")


def unindented(name: str) -> str:
    """A file of this package as template text: its indentation and newlines are for readers alone."""
    text = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return "".join(line.strip() for line in text.splitlines())


def translated(template: str) -> str:
    """Return the body of a template in MiniJinja; it calls the macros of `helpers`.

    Raises:
        CheckpointError: it is no template, or uses what MiniJinja has no counterpart of.
    """
    for word in _SWITCHES:
        if word in template:
            raise CheckpointError(f"the chat template has {word!r}, at which LiteRT-LM renders otherwise")
    environment: ImmutableSandboxedEnvironment = chat_environment()
    try:
        tree = environment.parse(template)
        return _Writer().body(tree.body)
    except TemplateError as error:
        raise CheckpointError(f"the chat template cannot be read ({error}): correct it") from error
    except RecursionError:
        raise CheckpointError("the chat template is nested too deeply: take the base model's") from None


class _Writer:
    """Writes statements and expressions; the state is the names of loops that a `continue` or `break` is in."""

    def __init__(self) -> None:
        self._loops: list[str | None] = []
        self._numbers = itertools.count()

    # Statements

    def body(self, statements: Iterable[nodes.Node]) -> str:
        statements = list(statements)
        written = []
        for number, statement in enumerate(statements):
            written.append(self._statement(statement))
            flag = self._loops[-1] if self._loops else None
            rest = statements[number + 1 :]
            if flag and rest and _leaves_loop(statement):
                return f"{''.join(written)}{{% if not {flag}.skip %}}{self.body(rest)}{{% endif %}}"
        return "".join(written)

    def _statement(self, node: nodes.Node) -> str:
        method = getattr(self, f"_write_{type(node).__name__.lower()}", None)
        if method is None:
            raise _refusal(node, f"the statement {type(node).__name__.lower()}")
        text: str = method(node)
        return text

    def _write_output(self, node: nodes.Output) -> str:
        return "".join(self._output(part) for part in node.nodes)

    def _output(self, part: nodes.Expr) -> str:
        if isinstance(part, nodes.TemplateData):
            return f"{{{{ {literal(part.data)} }}}}"
        return f"{{{{ {self.text(part)} }}}}"

    def _write_assign(self, node: nodes.Assign) -> str:
        return f"{{% set {self._target(node.target)} = {self.expression(node.node)} %}}"

    def _write_assignblock(self, node: nodes.AssignBlock) -> str:
        if node.filter is not None:
            raise _refusal(node, "a filter in a set block")
        return f"{{% set {self._target(node.target)} %}}{self._scoped(node.body)}{{% endset %}}"

    def _write_if(self, node: nodes.If) -> str:
        written = f"{{% if {self._condition(node.test)} %}}{self.body(node.body)}"
        for other in node.elif_:
            written += f"{{% elif {self._condition(other.test)} %}}{self.body(other.body)}"
        if node.else_:
            written += f"{{% else %}}{self.body(node.else_)}"
        return f"{written}{{% endif %}}"

    def _write_for(self, node: nodes.For) -> str:
        flag = f"{_PREFIX}loop_{next(self._numbers)}" if any(map(_leaves_loop, node.body)) else None
        if flag and node.recursive:
            raise _refusal(node, "continue or break in a recursive loop")
        condition = f" if {self._condition(node.test)}" if node.test is not None else ""
        recursive = " recursive" if node.recursive else ""
        head = f"{{% for {self._target(node.target)} in {self.expression(node.iter)}{condition}{recursive} %}}"
        self._loops.append(flag)
        body = self._scoped(node.body)  # what an iteration sets is not seen in the next
        self._loops.pop()
        other = f"{{% else %}}{self.body(node.else_)}" if node.else_ else ""
        if flag is None:
            return f"{head}{body}{other}{{% endfor %}}"
        start = f"{{% set {flag} = namespace(skip=false, stop=false) %}}"
        again = f"{{% if not {flag}.stop %}}{{% set {flag}.skip = false %}}{body}{{% endif %}}"
        return f"{start}{head}{again}{other}{{% endfor %}}"

    def _write_continue(self, node: nodes.Continue | nodes.Break) -> str:
        if not self._loops or self._loops[-1] is None:
            raise _refusal(node, "continue or break outside a loop")
        return f"{{% set {self._loops[-1]}.skip = true %}}"

    def _write_break(self, node: nodes.Break) -> str:
        return f"{self._write_continue(node)}{{% set {self._loops[-1]}.stop = true %}}"

    def _write_macro(self, node: nodes.Macro) -> str:
        self._check_name(node, node.name)
        loops, self._loops = self._loops, []
        written = f"{{% macro {node.name}({self._parameters(node)}) %}}{self.body(node.body)}{{% endmacro %}}"
        self._loops = loops
        return written

    def _write_callblock(self, node: nodes.CallBlock) -> str:
        parameters = f"({self._parameters(node)})" if node.args else ""
        return f"{{% call{parameters} {self.expression(node.call)} %}}{self.body(node.body)}{{% endcall %}}"

    def _write_with(self, node: nodes.With) -> str:
        # jinja2 evaluates all values before any name is set.
        self._check_apart(node, node.values, {name for target in node.targets for name in _names(target)})
        pairs = zip(node.targets, node.values, strict=True)
        values = ", ".join(f"{self._target(name)} = {self.expression(value)}" for name, value in pairs)
        return f"{{% with {values} %}}{self.body(node.body)}{{% endwith %}}"

    def _write_scope(self, node: nodes.Scope) -> str:
        return self._scoped(node.body)  # {% generation %}

    def _scoped(self, statements: Iterable[nodes.Node]) -> str:
        """Statements whose names are not seen behind them."""
        return f"{{% with {_PREFIX}scope = none %}}{self.body(statements)}{{% endwith %}}"

    def _check_apart(self, node: nodes.Node, values: Iterable[nodes.Node], names: Set[str]) -> None:
        used = {name for value in values for name in _names(value)}
        if used & names:
            raise _refusal(node, f"the name {min(used & names)} in the value of another name beside it")

    def _check_name(self, node: nodes.Node, name: str) -> None:
        if name.startswith(_PREFIX):
            raise _refusal(node, f"the name {name}")

    def _parameters(self, node: nodes.Macro | nodes.CallBlock) -> str:
        plain = len(node.args) - len(node.defaults)
        names = [name.name for name in node.args]
        for name in names:
            self._check_name(node, name)
        self._check_apart(node, node.defaults, set(names))
        values = [f"{name}={self.expression(value)}" for name, value in zip(names[plain:], node.defaults, strict=True)]
        return ", ".join(names[:plain] + values)

    def _target(self, node: nodes.Node) -> str:
        if isinstance(node, nodes.Tuple):
            return f"({', '.join(self._target(item) for item in node.items)})"
        if isinstance(node, nodes.NSRef):
            return f"{node.name}.{node.attr}"
        assert isinstance(node, nodes.Name)
        self._check_name(node, node.name)
        return node.name

    # Expressions

    def expression(self, node: nodes.Node) -> str:
        method = getattr(self, f"_as_{type(node).__name__.lower()}", None)
        if method is not None:
            text: str = method(node)
            return text
        if isinstance(node, nodes.BinExpr) and type(node) in _OPERATORS:
            if isinstance(node, nodes.Mod) and is_text(node.left):
                raise _refusal(node, "the operator % on a text")
            operand = self._condition if isinstance(node, nodes.And | nodes.Or) else self.expression
            return f"({operand(node.left)} {_OPERATORS[type(node)]} {operand(node.right)})"
        raise _refusal(node, f"the expression {type(node).__name__.lower()}")

    def _condition(self, node: nodes.Node) -> str:
        """An expression whose truth counts, or that is an operand of `and` and `or`."""
        if isinstance(node, nodes.Filter) and node.name in _GENERATORS:
            raise _refusal(node, f"the filter {node.name!r} as a condition: add | list")
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value in _OF_MAPS:
            # A key that a map lacks is its method in jinja2.
            value, owner = self.expression(node), self.expression(node.node)
            return f"({value} if {value} is defined else {owner} is mapping)"
        return self.expression(node)

    def text(self, node: nodes.Expr) -> str:
        """An expression as Python's str() of it."""
        written = self.expression(node)
        return written if is_text(node) else f"stock_text({written})"

    def _as_const(self, node: nodes.Const) -> str:
        return literal(node.value)

    def _as_templatedata(self, node: nodes.TemplateData) -> str:
        return literal(node.data)

    def _as_name(self, node: nodes.Name) -> str:
        if node.name in _REFUSED_NAMES or not node.name.isascii():
            raise _refusal(node, f"the name {node.name}")
        self._check_name(node, node.name)
        return node.name

    def _as_getattr(self, node: nodes.Getattr) -> str:
        if node.attr in _OF_MAPS:
            raise _refusal(node, f".{node.attr} without a call")
        return f"{self.expression(node.node)}.{node.attr}"

    def _as_getitem(self, node: nodes.Getitem) -> str:
        return f"{self.expression(node.node)}[{self.expression(node.arg)}]"

    def _as_slice(self, node: nodes.Slice) -> str:
        if node.step is not None and (node.start is not None or node.stop is not None):
            raise _refusal(node, "a slice with a step and an end")
        parts = [self.expression(part) if part is not None else "" for part in (node.start, node.stop)]
        return ":".join(parts) + (f":{self.expression(node.step)}" if node.step is not None else "")

    def _as_list(self, node: nodes.List) -> str:
        return f"[{', '.join(self.expression(item) for item in node.items)}]"

    _as_tuple = _as_list

    def _as_dict(self, node: nodes.Dict) -> str:
        pairs = (f"{self.expression(pair.key)}: {self.expression(pair.value)}" for pair in node.items)
        return f"{{ {', '.join(pairs)} }}"

    def _as_not(self, node: nodes.Not) -> str:
        return f"(not {self._condition(node.node)})"

    def _as_neg(self, node: nodes.Neg) -> str:
        return f"(-{self.expression(node.node)})"

    def _as_pos(self, node: nodes.Pos) -> str:
        return self.expression(node.node)

    def _as_concat(self, node: nodes.Concat) -> str:
        return f"({' ~ '.join(self.text(item) for item in node.nodes)})"

    def _as_condexpr(self, node: nodes.CondExpr) -> str:
        other = f" else {self.expression(node.expr2)}" if node.expr2 is not None else ""
        return f"({self.expression(node.expr1)} if {self._condition(node.test)}{other})"

    def _as_compare(self, node: nodes.Compare) -> str:
        parts, left = [], node.expr
        for operand in node.ops:
            parts.append(f"{self.expression(left)} {_COMPARISONS[operand.op]} {self.expression(operand.expr)}")
            left = operand.expr
        return f"({' and '.join(parts)})"

    def _as_test(self, node: nodes.Test) -> str:
        value = self.expression(node.node)
        key = node.node.arg if isinstance(node.node, nodes.Getitem) else None
        if node.name in ("defined", "undefined") and isinstance(key, nodes.Const) and key.value in _OF_MAPS:
            raise _refusal(node, f"the test {node.name!r} of the key {key.value!r}")  # in jinja2 also an attribute
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
            raise _refusal(node, f"the test {node.name!r}")
        return f"({value} is {node.name}{self._arguments(node)})"

    def _as_filter(self, node: nodes.Filter) -> str:
        if node.node is None:
            raise _refusal(node, "a filter block")
        value = self.expression(node.node)
        match node.name:
            case "string":
                return self.text(node.node)
            case "trim" if not node.args and not node.kwargs:
                return f"({self.text(node.node)} | trim({literal(WHITESPACE)}))"
            case "title":
                return f"stock_title({self.text(node.node)})"
            case "length" | "count":
                return f"({value} | default([]) | length)"
            case "items":
                return f"({value} | default({{}}) | items)"
            case "join" if not node.kwargs and len(node.args) < 2:
                between = self.text(node.args[0]) if node.args else '""'
                return f"stock_join({value}, {between})"
            case "tojson":
                return f"stock_json({value}{self._json_options(node)})"
            case "default" | "d":
                return self._default(node)
            case "sort" if not node.args and {pair.key for pair in node.kwargs} <= {"reverse", "attribute"}:
                return f"({value} | sort{self._arguments(node)})"
            case name if name in _TEXT_FILTERS:
                return f"({self.text(node.node)} | {name}{self._positional(node, _TEXT_FILTERS[name])})"
            case name if name in _APPLYING:
                self._check_applied(node)
                return f"({value} | {name}{self._arguments(node)})"
            case name if name in _FILTERS:
                return f"({value} | {name}{self._positional(node, ())})"
        raise _refusal(node, f"the filter {node.name!r}")

    def _default(self, node: nodes.Filter) -> str:
        """LiteRT-LM's own filter gives an empty text for none."""
        arguments = dict(zip(("default_value", "boolean"), node.args, strict=False))
        arguments |= {str(pair.key): pair.value for pair in node.kwargs}
        default, boolean = arguments.pop("default_value", None), arguments.pop("boolean", None)
        if arguments or len(node.args) > 2 or not (boolean is None or isinstance(boolean, nodes.Const)):
            raise _refusal(node, "the filter 'default' with other arguments")
        value = self.expression(node.node) if node.node is not None else ""
        other = literal("") if default is None else self.expression(default)
        if boolean is not None and boolean.value:
            return f"({value} or {other})"
        return f"({value} if {value} is defined else {other})"

    def _positional(self, node: nodes.Filter, names: Sequence[str]) -> str:
        """A filter's arguments in their order, those that have names too."""
        values = [self.expression(argument) for argument in node.args]
        named = {str(pair.key): self.expression(pair.value) for pair in node.kwargs}
        rest = names[len(values) :]
        if len(values) > len(names) or not named.keys() <= set(rest[: len(named)]):
            raise _refusal(node, f"the filter {node.name!r} with other arguments than {', '.join(names) or 'none'}")
        values += [named[name] for name in rest[: len(named)]]
        return f"({', '.join(values)})" if values else ""

    def _check_applied(self, node: nodes.Filter) -> None:
        """`map` and its like apply filters and tests by name: those that are translated otherwise cannot be."""
        place = _APPLYING[node.name]
        if {pair.key for pair in node.kwargs} - {"attribute"}:
            raise _refusal(node, f"the filter {node.name!r} with {node.kwargs[0].key}")
        if len(node.args) <= place:
            return
        applied = node.args[place]
        allowed = {"upper", "lower", "first", "last"} if node.name == "map" else _TESTS
        if not isinstance(applied, nodes.Const) or applied.value not in allowed:
            raise _refusal(node, f"the filter {node.name!r} with {getattr(applied, 'value', 'an expression')!r}")

    def _json_options(self, node: nodes.Filter) -> str:
        """json.dumps's arguments for stock_json."""
        names = ("ensure_ascii", "indent", "separators", "sort_keys")
        given: dict[str, nodes.Expr] = dict(zip(names, node.args, strict=False))
        given |= {str(pair.key): pair.value for pair in node.kwargs}
        try:
            options = {name: value.as_const() for name, value in given.items()}
        except nodes.Impossible:
            raise _refusal(node, "tojson with an argument that is no constant") from None
        if set(options) - set(names) or options.pop("ensure_ascii", False):
            raise _refusal(node, "tojson with " + ", ".join(sorted(given)))
        indent, separators = options.get("indent"), options.get("separators")
        comma, colon = separators or (", " if indent is None else ",", ": ")
        written = {"step": " " * indent if isinstance(indent, int) else indent, "comma": comma, "colon": colon}
        written["sort_keys"] = bool(options.get("sort_keys"))
        return "".join(f", {name}={literal(value)}" for name, value in written.items())

    def _as_call(self, node: nodes.Call) -> str:
        if isinstance(node.node, nodes.Getattr) and not _is_loop(node.node.node):
            return self._method(node, node.node.node, node.node.attr)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _refusal(node, "* or ** in a call")
        return f"{self.expression(node.node)}{self._arguments(node) or '()'}"

    def _method(self, node: nodes.Call, owner: nodes.Expr, name: str) -> str:
        value = self.expression(owner)
        arguments = [self.expression(argument) for argument in node.args]
        written = None if node.kwargs else written_call(name, value, arguments)
        if written is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _refusal(node, f"the method .{name}({', '.join('…' for _ in arguments)})")
        return written

    def _arguments(self, node: Any) -> str:
        written = [self.expression(argument) for argument in node.args]
        written += [f"{pair.key}={self.expression(pair.value)}" for pair in node.kwargs]
        return f"({', '.join(written)})" if written else ""


def is_text(node: nodes.Expr) -> bool:
    """Whether an expression is certain to be a text."""
    match node:
        case nodes.Const():
            return isinstance(node.value, str)
        case nodes.TemplateData() | nodes.Concat():
            return True
        case nodes.Filter():
            return node.name in _TEXT_FILTERS or node.name in ("string", "title", "join", "tojson")
        case nodes.Add():
            return is_text(node.left) or is_text(node.right)  # of a text and another kind there is no sum
        case nodes.CondExpr():
            return is_text(node.expr1) and (node.expr2 is None or is_text(node.expr2))
        case nodes.Call(node=nodes.Getattr(attr=name)):
            return name in TEXT_METHODS
    return False


def _names(node: nodes.Node) -> Iterator[str]:
    """The names in an expression."""
    if isinstance(node, nodes.Name):
        yield node.name
    for child in node.find_all(nodes.Name):
        yield child.name


def _is_loop(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _leaves_loop(node: nodes.Node) -> bool:
    """Whether a statement may `continue` or `break` the loop that it stands in."""
    if isinstance(node, nodes.Continue | nodes.Break):
        return True
    if isinstance(node, nodes.For):
        return any(map(_leaves_loop, node.else_))  # its own body leaves itself
    if isinstance(node, nodes.Macro | nodes.CallBlock):
        return False
    return any(_leaves_loop(child) for child in node.iter_child_nodes())


def _refusal(node: nodes.Node, what: str) -> CheckpointError:
    return CheckpointError(
        f"the chat template uses {what} in line {node.lineno}, which LiteRT-LM's renderer has no counterpart of: "
        "write it otherwise and give the file with --chat-template"
    )
