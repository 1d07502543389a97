"""Wiki markup to prose: every construct the dump uses, and what must never happen on odd input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.embedded.wikitext import Page, clean, is_article, pages

CASES = {
    "bold and italic": ("'''Anarchism''' is ''old''.", "Anarchism is old."),
    "link": ("the [[working class]] of [[France|the French]]", "the working class of the French"),
    "link ending": ("two [[radical]]s", "two radicals"),
    "pipe trick": ("[[Mercury (planet)|]] and [[Help:Contents|]]", "Mercury and Contents"),
    "other language": ("Text.[[de:Anarchie]][[zh-min-nan:A]]", "Text."),
    "category": ("Text.\n[[Category:Politics|*]]", "Text."),
    "category as a link": ("See [[:Category:Cats]].", "See Category:Cats."),
    "picture with links in its caption": ("[[Image:a.jpg|thumb|A [[cat]] and a [[dog|hound]]]]Text", "Text"),
    "web link with text": ("[http://example.org The page] says", "The page says"),
    "web link without text": ("It is so.[http://example.org/a_b]", "It is so."),
    "bare address": ("at http://example.org/x?y=1 today", "at today"),
    "template": ("{{Infobox|a={{b|c}}\n|d=e}}Text", "Text"),
    "template in a sentence": ("the ({{IPA|x}}) sound", "the sound"),
    "template never closed": ("{{cite book\nNext line.", "Next line."),
    "closing braces alone": ("odd }} braces", "odd braces"),
    "table": ("Before\n{| border=1\n|-\n! a || b\n|-\n| {{x|}} || {|\n| inner\n|}\n|}\nAfter", "Before\n\nAfter"),
    "reference": ("So<ref name=a>Book, [[p]]. 3</ref> it<ref name=a/> is", "So it is"),
    "comment": ("a<!-- [[b]] {{ -->c", "ac"),
    "formula": ("where <math>x^{2}}</math> is", "where is"),
    "html": ("H<sub>2</sub>O<br />and <b>more</b>", "H2O\nand more"),
    "entities": ("caf&eacute;&nbsp;&mdash; &#945;", "café — α"),
    "nowiki": ("<nowiki>two words</nowiki>", "two words"),
    "list": ("* one\n** two\n# three\n: four", "- one\n- two\n- three\nfour"),
    "heading": ("A.\n==History==\nB.\n=== Early ===\nC.", "A.\n\nHistory\n\nB.\n\nEarly\n\nC."),
    "heading of nothing": ("A.\n==See==\n==Next==\nB.", "A.\n\nNext\n\nB."),
    "heading of an outer section": ("==Outer==\n===Inner===\nB.", "Outer\n\nInner\n\nB."),
    "section of web links": ("A.\n==External links==\n* x\n===More===\n* y\n==Notes==\nB.", "A.\n\nNotes\n\nB."),
    "brackets left empty": ("Rome ({{it}}, ) is", "Rome is"),
    "commas left alone": ("except for {{a}}, {{b}}, and c", "except for, and c"),
    "numbers and several spaces": ("in  1969,   11 men", "in 1969, 11 men"),
}


@pytest.mark.parametrize("name", CASES)
def test_markup_becomes_prose(name: str) -> None:
    wiki, prose = CASES[name]
    assert clean(wiki) == prose


@given(st.text(alphabet="ab \n[]{}|'=*#:<>/!-&;.()\x02\u00a0", max_size=300))
def test_any_text_is_cleaned_of_links_and_line_noise(text: str) -> None:
    prose = clean(text)
    assert (
        "[[" not in prose and "\n\n\n" not in prose and "\u00a0" not in prose and "  " not in prose.replace("\n", " x ")
    )
    assert prose == prose.strip()


DUMP = """<mediawiki>
  <page>
    <title>A &amp; B</title>
    <id>1</id>
    <text xml:space="preserve">One &lt;b&gt;line&lt;/b&gt;
two</text>
  </page>
  <page>
    <title>Empty</title>
    <text xml:space="preserve"></text>
  </page>
  <page>
    <title>Cut</title>
    <text xml:space="preserve">This page never"""


def test_pages_of_a_dump_that_is_cut() -> None:
    assert list(pages(DUMP.splitlines(keepends=True))) == [Page("A & B", "One <b>line</b>\ntwo"), Page("Empty", "")]


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Anarchism", "Text", True),
        ("2001: A Space Odyssey", "Text", True),
        ("AaA", "#REDIRECT [[AAA]]", False),
        ("AaB", " #redirect: [[AAA]]", False),
        ("Template:Box", "Text", False),
        ("Wikipedia talk:Style", "Text", False),
    ],
)
def test_articles_are_told_from_other_pages(title: str, text: str, expected: bool) -> None:
    assert is_article(Page(title, text)) is expected
