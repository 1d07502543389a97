"""The experiments are not blind: each way to break the protocol is noticed by one of them."""

from __future__ import annotations

import pytest
from chaos import mutations

pytestmark = pytest.mark.timeout(300)


def test_every_mutant_is_noticed_and_the_real_thing_raises_no_alarm() -> None:
    (figure,) = mutations.run(seed=1, small=True)
    assert figure.trials == len(mutations.MUTANTS) >= 10
    assert figure.failures == 0, figure.facts
