"""The pictures of a run with what its model says of them, as a section of the page."""

from html import escape

from mm.report.elements import picture
from mm.report.pictures import Asked, Gallery, Hit, Query, Seen

START, END = "<!--gallery-->", "<!--/gallery-->"


def gallery_section(gallery: Gallery) -> str:
    """The section, between marks by which a later page finds it again."""
    name = f"<b>{escape(gallery.name)}</b>"
    parts = []
    if gallery.queries:
        parts.append(
            f'<h2>Found by words</h2><p class="faint about">Captions spread evenly over {name}, and what is nearest to '
            "each, best first, with the cosine. Green frames are right.</p>"
        )
        parts += map(_query, gallery.queries)
    if gallery.seen:
        parts.append(
            f'<h2>Described in words</h2><p class="faint about">Samples spread evenly over {name}, and the nearest to '
            f"each of {gallery.among:,} captions, best first, with the cosine. Those in green are its own.</p>"
        )
        parts.append(f'<div class="cards">{"".join(map(_seen, gallery.seen))}</div>')
    if gallery.asked:
        parts.append(
            f'<h2>Questions and answers</h2><p class="faint about">Questions spread evenly over {name}, and what was '
            "answered, with its accuracy by what people said.</p>"
        )
        parts.append(f'<div class="cards">{"".join(map(_asked, gallery.asked))}</div>')
    return f"{START}{''.join(parts)}{END}"


def gallery_of(page: str) -> str:
    """The section of an earlier page, empty where it has none."""
    start, end = page.find(START), page.find(END)
    return page[start : end + len(END)] if 0 <= start < end else ""


def _query(query: Query) -> str:
    hits = "".join(_hit(hit, rank) for rank, hit in enumerate(query.hits, start=1))
    return f'<div class="query"><p>{escape(query.text)}</p><ol class="hits">{hits}</ol></div>'


def _hit(hit: Hit, rank: int) -> str:
    kind, mark = ("right", " ✓") if hit.right else ("wrong", "")
    return f'<li class="{kind}">{picture(hit.picture, f"{kind}, rank {rank}")}{hit.score:.3f}{mark}</li>'


def _seen(seen: Seen) -> str:
    lines = "".join(
        f'<li class="{"right" if one.right else "wrong"}">{escape(one.text)} '
        f'<span class="score">{one.score:.3f}{" ✓" if one.right else ""}</span></li>'
        for one in seen.captions
    )
    return f'<div class="card">{picture(seen.picture, "described")}<ol class="said">{lines}</ol></div>'


def _asked(asked: Asked) -> str:
    right = bool(asked.answers) and asked.score >= 0.5
    people = ", ".join(dict.fromkeys(asked.answers))
    judged = f" {asked.score:.0%}{' ✓' if right else ''}" if asked.answers else ""
    said = f'<span class="{"right" if right else "wrong"}">{escape(asked.answered)}{judged}</span>'
    line = f'<br><span class="faint">people: {escape(people)}</span>' if people else ""
    return (
        f'<div class="card">{picture(asked.picture, "asked about")}'
        f'<p class="said"><b>{escape(asked.question)}</b><br>{said}{line}</p></div>'
    )
