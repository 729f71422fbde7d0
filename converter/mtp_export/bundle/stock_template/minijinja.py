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
from collections.abc import Iterable

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_export.bundle.stock_template.expressions import ExpressionWriter
from mtp_export.bundle.stock_template.methods import literal
from mtp_export.bundle.stock_template.syntax import PREFIX, check_apart, check_name, leaves_loop, names_in, refusal
from mtp_export.errors import CheckpointError
from mtp_runtime.text.chat import chat_environment

_SWITCHES = ("is_appending_to_prefill",)


def helpers() -> str:
    """Return the macros that a translated template calls, in MiniJinja."""
    return unindented("helpers.jinja")


def unindented(name: str) -> str:
    """Return a file of this package as template text: its indentation and newlines are for readers alone."""
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


class _Writer(ExpressionWriter):
    """Writes statements and expressions; the state is the names of loops that a `continue` or `break` is in."""

    def __init__(self) -> None:
        self._loops: list[str | None] = []
        self._numbers = itertools.count()

    def body(self, statements: Iterable[nodes.Node]) -> str:
        statements = list(statements)
        written = []
        for number, statement in enumerate(statements):
            written.append(self._statement(statement))
            flag = self._loops[-1] if self._loops else None
            rest = statements[number + 1 :]
            if flag and rest and leaves_loop(statement):
                return f"{''.join(written)}{{% if not {flag}.skip %}}{self.body(rest)}{{% endif %}}"
        return "".join(written)

    def _statement(self, node: nodes.Node) -> str:
        method = getattr(self, f"_write_{type(node).__name__.lower()}", None)
        if method is None:
            raise refusal(node, f"the statement {type(node).__name__.lower()}")
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
            raise refusal(node, "a filter in a set block")
        return f"{{% set {self._target(node.target)} %}}{self._scoped(node.body)}{{% endset %}}"

    def _write_if(self, node: nodes.If) -> str:
        written = f"{{% if {self.condition(node.test)} %}}{self.body(node.body)}"
        for other in node.elif_:
            written += f"{{% elif {self.condition(other.test)} %}}{self.body(other.body)}"
        if node.else_:
            written += f"{{% else %}}{self.body(node.else_)}"
        return f"{written}{{% endif %}}"

    def _write_for(self, node: nodes.For) -> str:
        flag = f"{PREFIX}loop_{next(self._numbers)}" if any(map(leaves_loop, node.body)) else None
        if flag and node.recursive:
            raise refusal(node, "continue or break in a recursive loop")
        condition = f" if {self.condition(node.test)}" if node.test is not None else ""
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
            raise refusal(node, "continue or break outside a loop")
        return f"{{% set {self._loops[-1]}.skip = true %}}"

    def _write_break(self, node: nodes.Break) -> str:
        return f"{self._write_continue(node)}{{% set {self._loops[-1]}.stop = true %}}"

    def _write_macro(self, node: nodes.Macro) -> str:
        check_name(node, node.name)
        loops, self._loops = self._loops, []
        written = f"{{% macro {node.name}({self._parameters(node)}) %}}{self.body(node.body)}{{% endmacro %}}"
        self._loops = loops
        return written

    def _write_callblock(self, node: nodes.CallBlock) -> str:
        parameters = f"({self._parameters(node)})" if node.args else ""
        return f"{{% call{parameters} {self.expression(node.call)} %}}{self.body(node.body)}{{% endcall %}}"

    def _write_with(self, node: nodes.With) -> str:
        # jinja2 evaluates all values before any name is set.
        check_apart(node, node.values, {name for target in node.targets for name in names_in(target)})
        pairs = zip(node.targets, node.values, strict=True)
        values = ", ".join(f"{self._target(name)} = {self.expression(value)}" for name, value in pairs)
        return f"{{% with {values} %}}{self.body(node.body)}{{% endwith %}}"

    def _write_scope(self, node: nodes.Scope) -> str:
        return self._scoped(node.body)  # {% generation %}

    def _scoped(self, statements: Iterable[nodes.Node]) -> str:
        """Statements whose names are not seen behind them."""
        return f"{{% with {PREFIX}scope = none %}}{self.body(statements)}{{% endwith %}}"

    def _parameters(self, node: nodes.Macro | nodes.CallBlock) -> str:
        plain = len(node.args) - len(node.defaults)
        names = [name.name for name in node.args]
        for name in names:
            check_name(node, name)
        check_apart(node, node.defaults, set(names))
        values = [f"{name}={self.expression(value)}" for name, value in zip(names[plain:], node.defaults, strict=True)]
        return ", ".join(names[:plain] + values)

    def _target(self, node: nodes.Node) -> str:
        if isinstance(node, nodes.Tuple):
            return f"({', '.join(self._target(item) for item in node.items)})"
        if isinstance(node, nodes.NSRef):
            return f"{node.name}.{node.attr}"
        assert isinstance(node, nodes.Name)
        check_name(node, node.name)
        return node.name
