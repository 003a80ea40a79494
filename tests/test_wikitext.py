"""Articles without their markup: what the reader of the page sees in its text, and nothing else."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest
from layouts import page

from mmrec.data.pipeline.mediawiki import read_mediawiki
from mmrec.data.pipeline.records import Record, Rejected
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.wikitext import clean, is_redirect

pytest.importorskip("mwparserfromhell")


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("Before\n[[File:A b.jpg|thumb|left|200px|alt=x|A [[grey]] stone]]\nafter.", "Before\n\nafter."),
        ("[[image:a.png]]Text.", "Text."),
        ("Text.\n[[Category:Rocks]]\n[[Category:Hard things|Stone]]", "Text."),
        ("Text. [[ category : Rocks ]] End.", "Text.  End."),
        ("[[Datei:F.jpg|mini|hochkant|Ein Fluss]] Text.\n[[Kategorie:Fluss]]", "Text."),
        ("[[\u0424\u0430\u0439\u043b:a.jpg|b]]Text.[[\u30ab\u30c6\u30b4\u30ea:\u5ddd]]", "Text."),
        ("[[T\u1eadp_tin:a.jpg]]Text.", "Text."),
        ("Text.\n[[de:Stein]]\n[[zh-min-nan:X]]\n[[simple:Stone]]", "Text."),
        ("[[:de:Stein]], [[:Category:Rocks]], [[:File:A.jpg|the file]]", "de:Stein, Category:Rocks, the file"),
        ("[[wikt:stone|stone]] and [[Star Wars: Episode I]]", "stone and Star Wars: Episode I"),
        ("__NOTOC__\n__NO_TOC__ Text __init__. __KEIN_INHALTSVERZEICHNIS__", "Text __init__."),
        ("Text<ref>Smith, p. 5</ref>, and<ref name=a /> more.<gallery>\nFile:A.jpg|b\n</gallery>", "Text, and more."),
        ("'''Bold''' [[river|old river]] {{template|x}}", "Bold old river"),
    ],
)
def test_what_is_no_running_text_goes(wikitext: str, text: str) -> None:
    assert clean(wikitext).strip() == text


REDIRECTS = ["#REDIRECT [[Stone]]", "\n#redirect: [[A]]", "#WEITERLEITUNG [[A]]", "#\u8f6c\u5411[[A]]"]


@pytest.mark.parametrize("text", REDIRECTS)
def test_a_redirect_in_any_language(text: str) -> None:
    assert is_redirect(text)
    assert not is_redirect(f"Text. {text}")


def test_a_list_is_no_redirect() -> None:
    assert not is_redirect("# [[one]]\n# [[two]]")
    assert not is_redirect("## one [[two]]")


def records(path: Path, first: int = 0, last: int | None = None) -> list[Record]:
    return list(read_mediawiki(Shard("mediawiki", str(path), first, last), "text"))


def test_the_dump_names_its_namespaces(tmp_path: Path) -> None:
    """Also to a worker that reads a part from the middle of a multistream dump."""
    names = {-2: "Medyo", 0: "", 6: "Paapu_dosya", 10: "Kalup", 14: "Kateg"}
    site = "".join(f'<namespace key="{key}" case="first-letter">{name}</namespace>' for key, name in names.items())
    head = f'<mediawiki xml:lang="xx"><siteinfo><namespaces>{site}</namespaces></siteinfo>\n'
    articles = [f"[[Paapu dosya:A.jpg|thumb|b]][[Kalup:t|kept]] {n}\n[[KATEG:C]][[Medyo:m|m]]" for n in range(4)]
    expected = [f"kept {n}" for n in range(4)]
    pages = [page(f"T{n}", text) for n, text in enumerate(articles)]
    (tmp_path / "a.xml").write_text(head + "".join(pages) + "</mediawiki>")
    assert records(tmp_path / "a.xml") == expected
    streams = [bz2.compress(part.encode()) for part in (head, *pages, "</mediawiki>")]
    path = tmp_path / "a-multistream.xml.bz2"
    path.write_bytes(b"".join(streams))
    starts = [sum(map(len, streams[: n + 1])) for n in range(5)]
    for number in range(4):
        assert records(path, starts[number], starts[number + 1]) == expected[number : number + 1]
    assert records(path, starts[2]) == expected[2:]


def test_redirects_without_their_tag_and_articles_without_text_are_set_aside(tmp_path: Path) -> None:
    pages = page("Old", "#REDIRECT [[T]]") + page("Older", "#REDIRECT [[T]]", redirect=True) + page("T", "Text.")
    (tmp_path / "a.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    assert records(tmp_path / "a.xml") == [Rejected("redirect", "Old"), "Text."]
