"""The joining of residual sums to the norms after them: what is recognised, what is not, and what stays as it was."""

from __future__ import annotations

import inspect
import linecache
import textwrap
import traceback
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_norm import rewriting


class Block(nn.Module):
    """Modules that note the order in which they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.p, self.flag, self.scale = 0.5, True, 2.0
        for name in ("norm", "norm2", "mlp", "attn", "dropout", "drop_path"):
            module = nn.LayerNorm(6) if "norm" in name else nn.Dropout(0.5) if "drop" in name else nn.Linear(6, 6)
            module.register_forward_hook(lambda *_, name=name: self.log.append(name))
            setattr(self, name, module)


def inline(self, x, r):
    return self.norm(self.attn(x) + r)


def inline_dropout(self, x, r):
    return self.norm(self.dropout(self.attn(x)) + r)


def dropout_before(self, x, r):
    x = self.attn(x)
    x = self.dropout(x)
    x = self.norm(x + r)
    return x


def sum_before(self, x, r):
    x = self.attn(x)
    x = r + x
    r = x
    x = self.norm(x)
    return r + self.mlp(x)


def functional_dropout(self, x, r):
    x = F.dropout(self.attn(x), p=self.p, training=self.training)
    x = r + x
    x = self.norm(x)
    return x


def functional_dropout_by_its_long_name(self, x, r):
    x = torch.nn.functional.dropout(self.attn(x), self.p, self.training)
    x = x + r
    residual = x
    x = self.norm2(residual)
    return x, residual


def nested_call(self, x, r):
    x = x + self.attn(r)
    x = x + self.mlp(self.norm(x))
    return x


def scaled(self, x, r):
    x = r + self.attn(x) * self.scale
    r = x
    x = self.norm(x)
    return r + self.mlp(x) * self.scale


def dropout_as_a_term(self, x, r):
    x = r + self.dropout(x)
    r = x
    x = self.norm(x)
    return x, r


def into_branches(self, x, r, other=None):
    x = self.dropout(self.attn(x))
    x = r + x
    if other is not None:
        r = x
        x = self.norm(x)
        x = self.mlp(x) + other
        x = r + x
    r = x
    x = self.norm2(x)
    return r + x


def one_branch(self, x, r):
    x = self.dropout(x)
    x = r + x
    if not self.flag:
        x = self.norm(x)
    return self.mlp(x)


def in_a_loop(self, x, r):
    for _ in range(3):
        x = x + r
        r = x
        x = self.norm(x)
    return x, r


JOINED = {
    inline: 1,
    inline_dropout: 1,
    dropout_before: 1,
    sum_before: 1,
    functional_dropout: 1,
    functional_dropout_by_its_long_name: 1,
    nested_call: 1,
    scaled: 1,
    dropout_as_a_term: 1,
    into_branches: 3,
    one_branch: 1,
    in_a_loop: 1,
}


def changed_between(self, x, r):
    x = x + r
    x.mul_(2)
    return self.norm(x)


def assigned_between(self, x, r):
    y = x + r
    y = F.relu(y)
    return self.norm(y)


def another_name(self, x, r):
    y = x + r  # noqa: F841
    return self.norm(x)


def conditional(self, x, r):
    x = x + r
    return self.norm(x) if self.flag else x


def short_circuit(self, x, r):
    x = x + r
    return (self.flag and self.norm(x)) or x


def condition_reads_the_sum(self, x, r):
    x = x + r
    if x.sum() > 0:
        x = self.norm(x)
    return x


def another_call_comes_first(self, x, r):
    x = x + r
    return self.mlp(r) * self.norm(x)


def more_arguments(self, x, r):
    return F.linear(x + r, self.mlp.weight)


def a_sum_of_three(self, x, r):
    return self.attn(x) * r


NOT_JOINED = [
    changed_between,
    assigned_between,
    another_name,
    conditional,
    short_circuit,
    condition_reads_the_sum,
    another_call_comes_first,
    more_arguments,
    a_sum_of_three,
]


def _join(function):
    """Joined by stand-ins that do the parts one by one, and count their calls."""
    calls = []

    def add_norm(norm, x, residual, p=0.0, training=False, first=True):
        calls.append("add_norm")
        x = F.dropout(x, p, training) if p else x
        summed = x + residual if first else residual + x
        return norm(summed), summed

    def dropout_add_norm(norm, dropout, x, residual, first):
        calls.append("dropout_add_norm")
        x = dropout(x)
        summed = x + residual if first else residual + x
        return norm(summed), summed

    found = rewriting.joined(function, add_norm, dropout_add_norm)
    return (None, [], calls) if found is None else (*found, calls)


def _run(function, block: Block, *args):
    torch.manual_seed(0)
    block.log.clear()
    out = function(block, *args)
    return out, list(block.log)


@pytest.mark.parametrize("function", JOINED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("flag", [True, False], ids=["flag", ""])
def test_joined(function, training: bool, flag: bool) -> None:
    """The same results, from the same modules in the same order."""
    joined, names, calls = _join(function)
    assert len(names) == JOINED[function]
    block = Block().train(training)
    block.flag = flag
    x, r, other = (torch.randn(4, 6) for _ in range(3))
    for args in ((x, r), (x, r, other)) if function is into_branches else ((x, r),):
        ours, theirs = _run(joined, block, *args), _run(function, block, *args)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
        assert ours[1] == theirs[1]
        assert calls or (function is one_branch and flag)


@pytest.mark.parametrize("function", [inline_dropout, dropout_before, dropout_as_a_term], ids=lambda f: f.__name__)
def test_dropout_joins(function) -> None:
    joined, _, calls = _join(function)
    joined(Block(), torch.randn(4, 6), torch.randn(4, 6))
    assert calls == ["dropout_add_norm"]


@pytest.mark.parametrize("function", NOT_JOINED, ids=lambda f: f.__name__)
def test_not_joined(function) -> None:
    assert rewriting.joined(function, None, None) is None


def dropped_value_is_used_again(self, x, r):
    y = self.dropout(x)
    x = y + r
    x = self.norm(x)
    return x + y


def a_dropout_of_another_kind(self, x, r):
    x = self.drop_path(x)
    x = x + r
    return self.norm(x)


def the_other_term_draws_too(self, x, r):
    x = self.dropout(x)
    x = self.dropout(r) + x
    return self.norm(x)


def a_scaled_dropout(self, x, r):
    x = self.dropout(x)
    x = self.scale * x + r
    x = self.norm(x)
    return x


def a_scaled_dropout_inside(self, x, r):
    x = F.dropout(x, p=self.p, training=self.training)
    x = self.norm(r + -x)
    return x


def dropped_value_is_read_in_the_same_statement(self, x, r):
    x = self.dropout(x)
    x = self.norm(x + r) + x
    return x


def the_left_term_is_changed_by_the_right(self, x, r):
    return self.norm(self.scale * x + self.dropout(x.mul_(2)))


def the_left_term_is_bound_by_the_right(self, x, r):
    return self.norm(r + self.dropout(r := self.attn(x)))


@pytest.mark.parametrize(
    "function",
    [
        dropped_value_is_used_again,
        a_dropout_of_another_kind,
        the_other_term_draws_too,
        a_scaled_dropout,
        a_scaled_dropout_inside,
        dropped_value_is_read_in_the_same_statement,
        the_left_term_is_changed_by_the_right,
        the_left_term_is_bound_by_the_right,
    ],
    ids=lambda f: f.__name__,
)
def test_a_dropout_that_may_not_join_stays(function) -> None:
    joined, names, _ = _join(function)
    assert names == ["norm"]
    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    ours, theirs = _run(joined, block, x.clone(), r), _run(function, block, x.clone(), r)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert ours[1] == theirs[1]


def a_call_changes_what_the_condition_reads(self, x, r):
    x = self.change(x) + r
    if self.flag:
        x = self.norm(x)
    return x


def test_a_sum_with_a_call_does_not_move_past_a_condition() -> None:
    assert rewriting.joined(a_call_changes_what_the_condition_reads, None, None) is None


def an_exception_between(self, x, r):
    h = x
    try:
        h = x + r
        y = self.fail(h)
    except RuntimeError:
        y = h
    return self.norm(y + r)


def test_a_sum_in_a_try_is_assigned_before_the_call() -> None:
    joined, names, _ = _join(an_exception_between)
    assert names == ["norm"]

    def fail(h):
        raise RuntimeError

    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    block.fail = fail
    torch.testing.assert_close(joined(block, x, r), an_exception_between(block, x, r))


def terms_that_are_no_tensors(self, x, r):
    c = [x] + [r]  # noqa: RUF005 (it is the sum that counts)
    return self.stack(c), self.get("no" + "rm")


def test_terms_keep_their_order() -> None:
    joined, _, _ = _join(terms_that_are_no_tensors)
    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    block.stack, block.get = torch.stack, lambda name: getattr(block, name)
    ours, theirs = joined(block, x, r), terms_that_are_no_tensors(block, x, r)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] is theirs[1]


def an_argument_called_dropout(self, x, dropout):
    return self.norm(dropout(x, p=0.5, training=True) + x)


def test_an_argument_is_not_torchs_dropout(monkeypatch) -> None:
    monkeypatch.setitem(globals(), "dropout", F.dropout)
    joined, _, calls = _join(an_argument_called_dropout)
    block, x = Block(), torch.randn(4, 6)
    torch.testing.assert_close(
        joined(block, x, lambda x, p, training: x * 3),
        an_argument_called_dropout(block, x, lambda x, p, training: x * 3),
    )
    assert calls == ["add_norm"]


def a_global(self, x, r):
    global SUMMED
    SUMMED = x + r
    return self.norm(SUMMED)


def test_a_global_is_left() -> None:
    assert rewriting.joined(a_global, None, None) is None


def two_aliases(self, x, r):
    x = x + r
    a = x
    b = a
    x = self.norm(b)
    return x, a, b


def alias_overwritten(self, x, r):
    y = x + r
    a = y
    a = self.norm(y)
    return a, y


def post_norm(self, x, r):
    x = x + r
    x = self.norm(x)
    return x, r


def another_result(self, x, r):
    x = x + r
    a = x
    y = self.norm(a)
    return x, a, y


@pytest.mark.parametrize(
    "function", [two_aliases, alias_overwritten, post_norm, another_result], ids=lambda f: f.__name__
)
def test_names_hold_what_they_held(function) -> None:
    joined, names, _ = _join(function)
    assert names == ["norm"]
    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    for ours, theirs in zip(joined(block, x, r), function(block, x, r), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_norms_result_is_not_held_longer() -> None:
    joined, _, _ = _join(sum_before)
    assert not any(name.startswith("__fused_norm_") for name in joined.__code__.co_varnames)


def test_a_shadowed_dropout_is_not_torchs() -> None:
    namespace = {"F": types.SimpleNamespace(dropout=lambda x, p, training: x * 2)}
    source = textwrap.dedent(inspect.getsource(functional_dropout))
    linecache.cache["shadow.py"] = (len(source), None, source.splitlines(keepends=True), "shadow.py")
    exec(compile(source, "shadow.py", "exec"), namespace)
    joined, _, calls = _join(namespace["functional_dropout"])
    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(joined(block, x, r), namespace["functional_dropout"](block, x, r))
    assert calls == ["add_norm"]


def with_defaults(self, x, r, *, p=0.25, **kwargs):
    """A docstring."""
    x = x + r * p
    return self.norm(x), kwargs


def test_signature_stays() -> None:
    joined, _, _ = _join(with_defaults)
    block, x, r = Block(), torch.randn(4, 6), torch.randn(4, 6)
    for options in ({}, {"p": 0.5}, {"other": 3}):
        ours, theirs = joined(block, x, r, **options), with_defaults(block, x, r, **options)
        torch.testing.assert_close(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def fails(self, x, r):
    x = x + r
    x = self.norm(x)
    raise ValueError("here")


def test_tracebacks_show_the_source() -> None:
    joined, _, _ = _join(fails)
    with pytest.raises(ValueError, match="here") as caught:
        joined(Block(), torch.randn(4, 6), torch.randn(4, 6))
    frame = traceback.extract_tb(caught.tb)[-1]
    assert frame.filename == __file__ and frame.line == 'raise ValueError("here")'


def test_without_its_source_nothing_is_done() -> None:
    namespace: dict = {"torch": torch, "F": F}
    exec(textwrap.dedent(inspect.getsource(sum_before)), namespace)  # no file holds it
    assert rewriting.joined(namespace["sum_before"], None, None) is None
    assert rewriting.digest(namespace["sum_before"]) is None


def test_a_source_that_is_not_what_runs_is_not_believed() -> None:
    source = textwrap.dedent(inspect.getsource(sum_before))
    namespace: dict = {}
    exec(compile(source, "edited.py", "exec"), namespace)
    edited = source.replace("r + x", "r - x")
    linecache.cache["edited.py"] = (len(edited), None, edited.splitlines(keepends=True), "edited.py")
    assert rewriting.source_of(namespace["sum_before"]) is None
    linecache.cache["edited.py"] = (len(source), None, source.splitlines(keepends=True), "edited.py")
    assert rewriting.source_of(namespace["sum_before"]) is not None


def test_a_closure_is_left() -> None:
    weight = torch.ones(6)

    def forward(self, x, r):
        x = x + r * weight
        return self.norm(x)

    assert rewriting.joined(forward, None, None) is None


def annotated(
    self, x: torch.Tensor, r: torch.Tensor | None = None
) -> torch.Tensor:  # the same as below but for what does not run
    """Says something."""
    return self.norm(x + r)


def plain(self, x, r=None):
    return self.norm(x + r)


def another_default(self, x, r=1):
    return self.norm(x + r)


def another_order(self, x, r=None):
    return self.norm(r + x)


def test_digests() -> None:
    assert rewriting.digest(annotated) == rewriting.digest(plain)
    assert len({rewriting.digest(f) for f in (plain, another_default, another_order, sum_before)}) == 4
    # The same on every Python that reads it.
    assert rewriting.digest(plain) == "a0202fecd61ef905"


class WithSuper(Block):
    def forward(self, x, r):
        x = self.attn(x) + r
        x = self.norm(x)
        return x, super().extra_repr()


def test_super_still_works() -> None:
    joined, names, calls = _join(WithSuper.forward)
    block, x, r = WithSuper(), torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(joined(block, x, r)[0], block(x, r)[0])
    assert names == ["norm"] and calls and joined(block, x, r)[1] == ""
