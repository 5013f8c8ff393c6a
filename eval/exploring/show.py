"""What was found as HTML: every text in it is escaped, and every picture is in the page itself."""

import base64
import html
from collections.abc import Sequence

from eval.exploring.index import Hit, Index
from eval.exploring.opened import Why
from eval.exploring.uploads import picture

LONGEST_SHOWN = 300  # characters of a caption
MOST_BARS = 20
HEAT = 384  # pixels

# of the page's own colours, which are light or dark as the browser asks
CSS = """
.mm-hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 12px; margin: 0; }
.mm-hit { margin: 0; min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; }
.mm-hit img, .mm-hit .mm-gone { width: 100%; height: 132px; object-fit: contain; display: block;
  background: var(--background-fill-secondary); }
.mm-hit figcaption { padding: 6px 8px; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.mm-hit small, .mm-note { color: var(--body-text-color-subdued); }
.mm-bars { display: grid; gap: 8px; margin-bottom: 10px; }
.mm-bar { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) 4.5em; gap: 10px; align-items: center; }
.mm-bar span { overflow-wrap: anywhere; }
.mm-bar i { display: block; height: 12px; border-radius: 6px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); overflow: hidden; }
.mm-bar i b { display: block; height: 100%; background: var(--color-accent); }
.mm-bar output { text-align: right; font-variant-numeric: tabular-nums; }
.mm-bad { border-left: 4px solid #d14343; padding: 8px 12px; background: var(--background-fill-secondary);
  color: var(--body-text-color); overflow-wrap: anywhere; margin: 0; }
.mm-answer { font-size: 22px; margin: 4px 0; overflow-wrap: anywhere; }
.mm-seen { max-width: 224px; max-height: 224px; border-radius: 8px; }
.mm-heat { width: min(100%, 384px); border-radius: 8px; }
.mm-why { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 16px; }
.mm-file .download a { pointer-events: none; color: inherit; }
.mm-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 24px; }
.mm-sides > section { min-width: 0; }
.mm-sides h3 { margin: 0 0 8px; overflow-wrap: anywhere; font-size: 15px; }
"""


def text(given: str, most: int = LONGEST_SHOWN) -> str:
    """A text of others: no markup, and no sign in it that turns the writing round reaches beyond it."""
    short = given if len(given) <= most else f"{given[: most - 1]}…"
    return f"<bdi>{html.escape(short)}</bdi>"


def refusal(message: str) -> str:
    """Why something is not done."""
    return f'<p class="mm-bad" role="alert">{text(message, 1000)}</p>'


def note(message: str) -> str:
    """What the reader should know."""
    return f'<p class="mm-note">{text(message, 1000)}</p>'


def image(jpeg: bytes, kind: str, alternative: str) -> str:
    """A picture."""
    data = base64.b64encode(jpeg).decode()
    return f'<img class="{kind}" alt="{html.escape(alternative[:100])}" src="data:image/jpeg;base64,{data}">'


def hits(found: Sequence[Hit], index: Index) -> str:
    """Samples with their scores, keys and captions."""
    return f'<div class="mm-hits">{"".join(_hit(one, index) for one in found)}</div>'


def bars(found: Sequence[tuple[str, float]], what: str) -> str:
    """Shares in [0, 1] by name; the first ones, where there are many. what: what they are."""
    lines = "".join(
        f'<div class="mm-bar"><span>{text(name)}</span><i><b style="width:{100 * share:.2f}%"></b></i>'
        f"<output>{share:.1%}</output></div>"
        for name, share in found[:MOST_BARS]
    )
    more = f"; the first {MOST_BARS} of {len(found)}" if len(found) > MOST_BARS else ""
    return f'<div class="mm-bars">{lines}</div>{note(what + more)}'


def answer(given: str) -> str:
    """A sentence of the model's."""
    return f'<p class="mm-answer">{text(given, 1000)}</p>' if given else note("(the model wrote nothing)")


def why(found: Why) -> str:
    """The heat over the image, and the words by their share."""
    heat = image(picture(found.heat, HEAT), "mm-heat", "what the score rests on, hot where it counts most")
    words = (
        bars(found.words, "share of each word") if found.words else note("no shares of words: none are read")
    )
    return f'{note(f"{found.what} {found.score:.3f}")}<div class="mm-why"><div>{heat}</div><div>{words}</div></div>'


def sides(parts: Sequence[tuple[str, str]]) -> str:
    """Titles, and what was made here of each, side by side."""
    made = "".join(f"<section><h3>{text(title)}</h3>{inside}</section>" for title, inside in parts)
    return f'<div class="mm-sides">{made}</div>'


def _hit(one: Hit, index: Index) -> str:
    jpeg = index.thumbnail(one.place)
    seen = image(jpeg, "", one.key) if jpeg else '<div class="mm-gone">cannot be read any more</div>'
    caption = f"<br>{text(one.caption)}" if one.caption else ""
    return (
        f'<figure class="mm-hit">{seen}<figcaption><b>{one.score:.3f}</b> <small>{text(one.key)}</small>{caption}'
        "</figcaption></figure>"
    )
