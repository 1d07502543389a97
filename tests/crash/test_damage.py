"""A small set of `make chaos`: damaged files are refused or read rightly, and `verify` notices each."""

from __future__ import annotations

from chaos.damage import run


def test_damage_is_never_read_as_rows() -> None:
    figures = run(seed=2, small=True)
    assert sum(figure.trials for figure in figures) > 300
    for figure in figures:
        assert figure.failures == 0, (figure.what, figure.facts)
    alone = figures[2].facts["torch.load alone"]
    assert any("silence" in outcome for outcome in alone), "the harm is real: without a seal it would go unnoticed"
    assert any("silence" in told for told in figures[3].facts.values())
