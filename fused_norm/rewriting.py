"""A block's forward with each ``residual + x`` joined to the norm that follows it, made from the forward's own source.

The change is local, so it needs to know nothing of the rest: wherever a sum of two terms goes straight into
``self.name(...)``, the two become one call of :func:`fused_norm.adapters.add_norm`, which gives the module's result and
the sum. It runs the fused kernel where ``self.name`` then is a fused norm, and else calls the module with the sum; so
the new function does what the old one does, whatever ``self.name`` is. What is recognised, with ``x`` for any name:

=========================================  ============================================================================
a sum inside the call                      ``x = self.norm(a + b)``
a sum before the call                      ``x = a + b``, then aliases (``residual = x``), then ``self.norm(x)`` inside
                                           the next statement, which nothing keeps from being evaluated first
a dropout before the sum                   ``a = self.dropout(a)`` or ``a = F.dropout(a, p=..., training=...)``, or
                                           such a call as a term of the sum
an ``if`` between the sum and the call     the sum moves into both branches, where the condition does not read it; and
                                           a call after an ``if`` whose branch ends with a sum moves into both
=========================================  ============================================================================

The source is trusted only if it compiles to the very instructions that the function has. Line numbers stay, so a
traceback shows the line of the source that it means.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import dis
import functools
import hashlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F

_Statements = list[ast.stmt]
_CLASS = ("__class__",)  # the name that super() without arguments takes from around a function

# ---------------------------------------------------------------------------------------------------------- the source


def _instructions(code: types.CodeType) -> tuple:
    """What ``code`` does, whatever its lines: comparable within one Python."""
    steps = []
    for step in dis.get_instructions(code):
        value = _instructions(step.argval) if isinstance(step.argval, types.CodeType) else step.argval
        steps.append((step.opname, type(value), value))
    return tuple(steps)


def _imports(statements: _Statements) -> Iterator[ast.stmt]:
    """The import statements of a module, but for those inside functions and classes."""
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield statement
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _imports([child for child in ast.walk(statement) if isinstance(child, ast.stmt)][1:])


@functools.cache
def _never_imported(filename: str) -> ast.If:
    """The imports of a file, in a branch that is never taken: the compiler calls an attribute of a name that a module
    imports by other instructions than that of any other."""
    try:
        found = list(_imports(ast.parse("".join(linecache.getlines(filename))).body))
    except SyntaxError:
        found = []
    found = [s for s in found if not (isinstance(s, ast.ImportFrom) and s.module == "__future__")]
    return ast.If(ast.Constant(False), [*found, ast.Pass()], [])


def _compiled(tree: ast.FunctionDef, function: types.FunctionType, outer: tuple[str, ...] = ()) -> Callable:
    """A function like ``function`` from its tree; ``outer`` are names that it finds in a scope around it, which the
    result takes: ``_compiled(...)(*values)`` is the function."""
    maker = ast.parse(f"def make({', '.join(outer)}):\n    return None").body[0]
    bare = copy.deepcopy(tree)
    bare.decorator_list, bare.returns = [], None
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    maker.body = [bare, ast.Return(ast.Name(bare.name, ast.Load()))]
    filename = function.__code__.co_filename
    module = ast.fix_missing_locations(ast.Module([copy.deepcopy(_never_imported(filename)), maker], []))
    namespace: dict[str, Callable] = {}
    # Not in the module's own namespace: what is defined here is nobody else's business.
    exec(compile(module, filename, "exec", dont_inherit=True), function.__globals__, namespace)

    def make(*values: object) -> types.FunctionType:
        made = namespace["make"](*values)
        made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        return made

    return make


def source_of(function: types.FunctionType) -> ast.FunctionDef | None:
    """The tree of ``function``'s definition, if its source is there and is what runs; else None."""
    outer = function.__code__.co_freevars
    if outer not in ((), _CLASS):  # a function made by another
        return None
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    ast.increment_lineno(tree, start - 1)
    for default in (*tree.args.defaults, *filter(None, tree.args.kw_defaults)):
        if not isinstance(default, (ast.Constant, ast.UnaryOp)):  # evaluated again, it might be another
            return None
    try:
        again = _compiled(tree, function, outer)(*outer)
    except Exception:  # a source that does not run is not the function's
        return None
    return tree if _instructions(again.__code__) == _instructions(function.__code__) else None


_UNSAID = ("returns", "annotation", "decorator_list", "type_comment", "type_params", "kind", "ctx", "name")


def _said(node: object) -> str:
    if isinstance(node, list):
        return f"[{' '.join(map(_said, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _UNSAID)
    return f"({type(node).__name__} {' '.join(f'{name}={_said(value)}' for name, value in fields)})"


def digest(function: types.FunctionType) -> str | None:
    """A short name for what ``function`` does, the same for all Pythons, and whatever its annotations, decorators,
    lines, docstring and name; None without its source."""
    tree = source_of(function)
    if tree is None:
        return None
    body = tree.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return hashlib.sha256(f"{_said(tree.args)} {_said(body)}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- what is looked at


def _names(node: ast.AST) -> Iterator[str]:
    return (n.id for n in ast.walk(node) if isinstance(n, ast.Name))


def _own_call(node: ast.AST) -> str | None:
    """``name`` of ``self.name(one argument)``."""
    plain = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    if not plain or isinstance(node.args[0], ast.Starred) or not isinstance(node.func, ast.Attribute):
        return None
    return node.func.attr if isinstance(node.func.value, ast.Name) and node.func.value.id == "self" else None


def _assigned(statement: ast.stmt) -> str | None:
    """``x`` of ``x = ...``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _alias_of(statement: ast.stmt, names: set[str]) -> str | None:
    """``x`` of ``x = y``, with y one of the names."""
    name = _assigned(statement)
    value = statement.value if name else None
    return name if isinstance(value, ast.Name) and value.id in names and name not in names else None


def _sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _quiet(node: ast.AST) -> bool:
    """Whether evaluating it calls nothing."""
    return not any(
        isinstance(n, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)) for n in ast.walk(node)
    )


def _binds(node: ast.AST) -> bool:
    return any(isinstance(n, ast.NamedExpr) for n in ast.walk(node))


def _evaluated_first(node: ast.AST, wanted: Callable[[ast.AST], bool]) -> tuple[ast.AST, str, int | None] | None:
    """The place (parent, field, index) of the first call in order of evaluation, if it is one that is wanted: nothing
    is called before it, and it is called in any case."""
    order = {
        ast.Call: ("func", "args", "keywords"),
        ast.keyword: ("value",),
        ast.Attribute: ("value",),
        ast.BinOp: ("left", "right"),
        ast.Tuple: ("elts",),
        ast.Starred: ("value",),
        ast.Subscript: ("value",),
        ast.Assign: ("value",),
        ast.Return: ("value",),
        ast.Expr: ("value",),
    }
    for field in order.get(type(node), ()):
        value = getattr(node, field)
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if child is None or _quiet(child):
                continue
            if wanted(child):
                return node, field, index if isinstance(value, list) else None
            return _evaluated_first(child, wanted)
    return None


# ------------------------------------------------------------------------------------------------------ what is written


@dataclass
class _Dropped:
    """A term ``dropout(x)`` of a sum: ``module`` is self.dropout, or None for torch's function with p and training."""

    x: ast.expr
    module: ast.expr | None
    options: tuple[ast.expr, ...] = ()
    name: str = ""  # of what a statement of its own dropped


class _Rewriter:
    def __init__(self, function: types.FunctionType) -> None:
        code = function.__code__
        self.locals = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        self.globals = function.__globals__
        self.count = 0
        self.joined: list[str] = []

    def _is_torchs_dropout(self, func: ast.expr) -> bool:
        if not _quiet(func) or self.locals & set(_names(func)):
            return False
        try:
            found = eval(ast.unparse(func), self.globals)
        except Exception:  # no such name
            return False
        return found is F.dropout

    def _dropped(self, node: ast.expr) -> _Dropped | None:
        name = _own_call(node)
        if name is not None:
            return _Dropped(node.args[0], node.func) if "drop" in name else None
        if not isinstance(node, ast.Call) or not self._is_torchs_dropout(node.func):
            return None
        given = dict(zip(("input", "p", "training"), node.args, strict=False))
        given |= {k.arg: k.value for k in node.keywords}
        if given.keys() != {"input", "p", "training"} or len(node.args) + len(node.keywords) != 3:
            return None
        if not _quiet(given["p"]) or not _quiet(given["training"]):
            return None
        return _Dropped(given["input"], None, (given["p"], given["training"]))

    def _joined(self, norm: ast.expr, terms: ast.BinOp, before: _Dropped | None) -> ast.expr:
        """``(norm(summed), summed)`` in one call. ``before``: what a statement before has dropped, which is a term.

        The other term is evaluated before the dropout then, where it may have come after: so it must be a name, and
        one that nothing in the dropped term binds.
        """
        x, residual, dropped, first = terms.left, terms.right, None, True
        if before is not None:
            dropped, first = before, isinstance(x, ast.Name) and x.id == before.name
        elif (found := self._dropped(x)) is not None and isinstance(residual, ast.Name):
            dropped = found
        elif (found := self._dropped(residual)) is not None and isinstance(x, ast.Name) and not _binds(residual):
            dropped, first = found, False
        if not first:
            x, residual = residual, x
        helper, args = "__fused_norm_add_norm", [norm, x, residual]
        if dropped is not None:
            args[1] = dropped.x
            if dropped.module is not None:
                helper, args = "__fused_norm_dropout_add_norm", [norm, dropped.module, *args[1:]]
            args += [*dropped.options, ast.Constant(first)]
        self.joined.append(norm.attr)
        return ast.copy_location(ast.Call(ast.Name(helper, ast.Load()), args, []), terms)

    def _before(self, done: _Statements, terms: ast.BinOp, target: str | None) -> _Dropped | None:
        """What the statement before drops, if it is a term of the sum and the other term another name, and nobody
        reads it afterwards: the sum takes its name."""
        name = _assigned(done[-1]) if done else None
        names = [term.id for term in (terms.left, terms.right) if isinstance(term, ast.Name)]
        if name is None or name != target or len(names) != 2 or names.count(name) != 1:
            return None
        dropped = self._dropped(done[-1].value)
        return None if dropped is None else dataclasses.replace(dropped, name=name)

    def _inline(self, statement: ast.stmt, done: _Statements) -> None:
        """``self.norm(a + b)`` inside the statement."""
        place = _evaluated_first(statement, lambda n: _own_call(n) is not None and _sum(n.args[0]))
        if place is None:
            return
        parent, field, index = place
        value = getattr(parent, field)
        call = value if index is None else value[index]
        before = self._before(done, call.args[0], _assigned(statement))
        if (
            before is not None and list(_names(statement)).count(before.name) > 2
        ):  # what it is assigned to, and the term
            before = None
        if before is not None:
            done.pop()
        joined = self._joined(call.func, call.args[0], before)
        first = ast.copy_location(ast.Subscript(joined, ast.Constant(0), ast.Load()), call)
        if index is None:
            setattr(parent, field, first)
        else:
            value[index] = first

    def block(self, statements: _Statements) -> _Statements:
        """The statements with what was found joined."""
        done: _Statements = []
        rest = self._tails_into_branches(statements)
        while rest:
            statement, *rest = rest
            target = _assigned(statement)
            if target is not None and _sum(statement.value):
                taken = self._sum_then_norm(statement, target, rest, done)
                if taken is not None:
                    rest = taken
                    continue
            self._inline(statement, done)
            # Not into with and try, which may go on after an exception and find the sum not assigned, nor into
            # functions within.
            if isinstance(statement, (ast.If, ast.For, ast.While)):
                statement.body, statement.orelse = self.block(statement.body), self.block(statement.orelse)
            done.append(statement)
        return done

    def _sum_then_norm(
        self, statement: ast.Assign, target: str, rest: _Statements, done: _Statements
    ) -> _Statements | None:
        """``x = a + b`` and what follows: what is left to do after it, with what is done added to ``done``; None if
        no norm follows."""
        aliases: _Statements = []
        names = {target}
        while rest and (name := _alias_of(rest[0], names)):
            names.add(name)
            aliases.append(rest[0])
            rest = rest[1:]
        if not rest:
            return None
        following = rest[0]

        def wanted(node: ast.AST) -> bool:
            return _own_call(node) is not None and isinstance(node.args[0], ast.Name) and node.args[0].id in names

        place = _evaluated_first(following, wanted)
        if place is not None:
            parent, field, index = place
            value = getattr(parent, field)
            call = value if index is None else value[index]
            before = self._before(done, statement.value, target)
            if before is not None:
                done.pop()
            joined = ast.copy_location(self._joined(call.func, statement.value, before), statement)
            normalised = _assigned(following) if parent is following else None
            if normalised is None or (normalised in names and normalised != target):
                self.count += 1
                normalised = f"__fused_norm_{self.count}"
                result = ast.copy_location(ast.Name(normalised, ast.Load()), call)
                if index is None:
                    setattr(parent, field, result)
                else:
                    value[index] = result
            else:
                rest = rest[1:]
            # Where the norm's result takes the sum's name, the sum takes that of its first alias, if it has any.
            summed = target
            if normalised == target:
                summed = _assigned(aliases[0]) if aliases else None
                for alias in aliases[1:]:
                    alias.value.id = summed if alias.value.id == target else alias.value.id
                aliases = aliases[1:]
            if summed is None:
                target_node = ast.Name(normalised, ast.Store())
                joined = ast.Subscript(joined, ast.Constant(0), ast.Load())
            else:
                target_node = ast.Tuple([ast.Name(normalised, ast.Store()), ast.Name(summed, ast.Store())], ast.Store())
            done.append(ast.copy_location(ast.Assign([target_node], joined), statement))
            done.extend(aliases)
            return rest
        if (
            isinstance(following, ast.If)
            and _quiet(following.test)
            and not names & set(_names(following.test))
            and _quiet(statement.value)  # a call might change what the condition reads
        ):
            moved = [statement, *aliases]
            before = self._before(done, statement.value, target)
            if before is not None and _quiet(before.x):
                moved = [done[-1], *moved]
            tried = _Rewriter.__new__(_Rewriter)
            tried.__dict__ = {**self.__dict__, "joined": list(self.joined)}
            body, orelse = (tried.block(copy.deepcopy(moved + branch)) for branch in (following.body, following.orelse))
            # Moving the sum is worth it where a branch begins with its norm.
            if len(tried.joined) > len(self._alone(following)):
                self.__dict__.update(tried.__dict__)
                del done[len(done) - (len(moved) - 1 - len(aliases)) :]
                done.append(ast.copy_location(ast.If(following.test, body, orelse), following))
                return rest[1:]
        return None

    def _alone(self, statement: ast.If) -> list[str]:
        """What there would be to join without the sum before it."""
        tried = _Rewriter.__new__(_Rewriter)
        tried.__dict__ = {**self.__dict__, "joined": list(self.joined)}
        tried.block([copy.deepcopy(statement)])
        return tried.joined

    def _tails_into_branches(self, statements: _Statements) -> _Statements:
        """``if ...: ...; x = a + b`` and then ``x``'s norm: the norm's statement moves into both branches."""
        done: _Statements = []
        rest = list(statements)
        while rest:
            statement, *rest = rest
            if isinstance(statement, ast.If):
                ends = {_assigned(b[-1]) for b in (statement.body, statement.orelse) if b and _ends_with_sum(b)}
                tail: _Statements = []
                names = ends - {None}
                while names and rest and (name := _alias_of(rest[0], names)):
                    names.add(name)
                    tail.append(rest[0])
                    rest = rest[1:]

                def wanted(node: ast.AST, names: set[str] = names) -> bool:
                    return (
                        _own_call(node) is not None and isinstance(node.args[0], ast.Name) and node.args[0].id in names
                    )

                if names and rest and _evaluated_first(rest[0], wanted) is not None:
                    tail.append(rest[0])
                    rest = rest[1:]
                    statement = ast.copy_location(
                        ast.If(
                            statement.test,
                            statement.body + copy.deepcopy(tail),
                            statement.orelse + copy.deepcopy(tail),
                        ),
                        statement,
                    )
                else:
                    rest = tail + rest
            done.append(statement)
        return done


def _ends_with_sum(statements: _Statements) -> bool:
    return _assigned(statements[-1]) is not None and _sum(statements[-1].value)


def joined(
    function: types.FunctionType, add_norm: Callable, dropout_add_norm: Callable
) -> tuple[Callable, list[str]] | None:
    """``function`` with its sums joined to what follows them, and the names of the modules that they go into; None if
    there are none, or its source is not to be had.

    Args:
        function: a plain function, the forward of a module.
        add_norm: ``(module, x, residual[, p, training, first]) -> (module(summed), summed)``, with ``summed = x +
            residual``, or ``residual + x`` where ``first`` is False.
        dropout_add_norm: ``(module, dropout, x, residual, first)``, likewise, with a module for the dropout of x.
    """
    tree = source_of(function)
    if tree is None or any(isinstance(n, (ast.Global, ast.Nonlocal)) for n in ast.walk(tree)):
        return None
    rewriter = _Rewriter(function)
    tree.body = rewriter.block(tree.body)
    if not rewriter.joined:
        return None
    outer = {"__fused_norm_add_norm": add_norm, "__fused_norm_dropout_add_norm": dropout_add_norm}
    if function.__code__.co_freevars:
        outer["__class__"] = function.__closure__[0].cell_contents
    return _compiled(tree, function, tuple(outer))(*outer.values()), rewriter.joined
