"""What a test of a transformation is: a change of nano's folders, and what is to come of it.

    @equal()
    def saved_in_shards(pair): ...

    @refused("tensor lm_head.weight is missing", remedy=lambda pair: pair.config({"tie_word_embeddings": True}))
    def said_to_be_untied(pair): ...

`SUITE.run(name, record_property)` is the test. Every function is named after what a tool does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tests.differential import oracle
from tests.differential.oracle import Pair

_READ_WEIGHTS = "holds NaN or infinity"  # what is found when weights are read, which a plan does not
Change = Callable[[Pair], Pair | None]
Record = Callable[[str, object], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    change: Change
    words: Sequence[str]  # of what is left aside, or of the refusal
    refused: bool = False
    loads: bool = True  # whether transformers loads the folder; where it does not, it is nano, unchanged
    remedy: Change | None = None


class Suite:
    """The transformations of one module of tests."""

    def __init__(self) -> None:
        """Start with none."""
        self.cases: dict[str, _Case] = {}

    def equal(self, *left_aside: str, loads: bool = True) -> Callable[[Change], Change]:
        """Register a change after which our export is what transformers loads, and `left_aside` is reported.

        With `loads` false transformers does not load it, and it is nano all the same.
        """
        return self._register(lambda change: _Case(change=change, words=left_aside, loads=loads))

    def refused(self, words: str, *, remedy: Change | None = None) -> Callable[[Change], Change]:
        """Register a change that is refused with these words; where they name a remedy, `remedy` follows it, and then
        the folders are nano again."""
        return self._register(lambda change: _Case(change=change, words=(words,), refused=True, remedy=remedy))

    def _register(self, make: Callable[[Change], _Case]) -> Callable[[Change], Change]:
        def register(change: Change) -> Change:
            name = getattr(change, "__name__", str(change))
            assert name not in self.cases, f"two transformations are called {name}"
            self.cases[name] = make(change)
            return change

        return register

    def run(self, name: str, record_property: Record) -> None:
        """Test one transformation, and record what came of it for the summary of the run."""
        case = self.cases[name]
        with oracle.nano_pair() as pair:
            pair = case.change(pair) or pair
            if case.refused:
                message = oracle.refusal(pair)
                assert case.words[0] in message
                if _READ_WEIGHTS not in message:
                    assert oracle.refusal(pair, oracle.planned) == message
                if case.remedy is not None:
                    pair = case.remedy(pair) or pair
                    run, _ = oracle.exported(pair)
                    oracle.assert_nano(run)
            else:
                run, result = oracle.exported(pair)
                if case.loads:
                    oracle.assert_transformers_agrees(run, pair)
                else:
                    oracle.assert_nano(run)
                assert [words for words in case.words if words not in result.left_aside] == [], result.left_aside
                if not case.words:
                    assert result.left_aside == (), result.left_aside
        record_property("transformation", "refused" if case.refused else "equal")
