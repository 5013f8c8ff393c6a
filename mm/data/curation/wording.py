"""What a caption is made of: its words, its script, and whether it looks like a caption at all."""

import html
import re
import unicodedata
from collections import Counter
from functools import lru_cache

WORD = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)*")
LONGEST_WORD = 60  # characters; longer ones are counted under their beginning

_FILE = re.compile(
    r"\S.{0,200}\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|pdf|mp4|psd)"
    r"|(?:img|dsc[nf]?|dcim|pict?|image|photo|screenshot|screen shot|untitled|scan)"
    r"[-_ ]?\(?\d[\d_() -]*(?:copy|edit(?:ed)?)?",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?:https?|ftp)://|www\.\w|\bdata:image/", re.IGNORECASE)
_MARKUP = re.compile(
    r"</?[a-z!][^<>]{0,200}>|&(?:[a-z]{2,8}|#x?[0-9a-f]+);|\{\{|\[/?(?:img|url|b|caption)\b", re.IGNORECASE
)
_HEX = re.compile(
    r"(?:0x)?[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8,}(?:[-_ ][0-9a-f]{4,})+",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")
# UTF-8 that was read as Latin-1 or Windows-1252 and saved again, or could not be read
_BROKEN = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf\u2018-\u2026€™ž]|â€[\u0080-\u2122]|Ð[\u0080-\u00bf]Ð")

# what `kind` tells, in the order it tries them
KINDS = {
    "file name": "file names",
    "address": "addresses of pages or files",
    "markup": "markup",
    "code": "hexadecimal or encoded strings",
    "repeated": "one token repeated",
    "broken encoding": "text of a broken encoding",
    "no letters": "no letters",
}


def words(caption: str) -> list[str]:
    """Its words in lower case. Scripts without spaces between words give runs of characters."""
    return [word.lower()[:LONGEST_WORD] for word in WORD.findall(caption)]


def kind(caption: str, found: list[str] | None = None) -> str | None:
    """The key of KINDS that a caption falls under, None where it looks like a caption.

    Args:
        found: its `words`, where they are known.
    """
    text = caption.strip()
    found = words(text) if found is None else found
    if _FILE.fullmatch(text):
        return "file name"
    if _ADDRESS.search(text):
        return "address"
    if _MARKUP.search(text):
        return "markup"
    if _HEX.fullmatch(text) and any(c.isdigit() for c in text):
        return "code"
    if _CODE.fullmatch(text) and any(c.isdigit() for c in text) and any(c.isalpha() for c in text):
        return "code"
    if _repeats(text, found):
        return "repeated"
    if _BROKEN.search(text):
        return "broken encoding"
    if not any(c.isalpha() for c in text):
        return "no letters"
    return None


def _repeats(text: str, found: list[str]) -> bool:
    if len(text) >= 6 and len(set(text)) == 1:
        return True
    if len(found) < 4:
        return False
    return max(Counter(found).values()) > 0.7 * len(found)


def script(caption: str) -> tuple[str, bool]:
    """The script of most of its letters ("none" without letters), and whether another has a tenth of them."""
    if caption.isascii():
        return ("Latin" if any(map(str.isalpha, caption)) else "none"), False
    counts = Counter(script_of(letter) for letter in caption if letter.isalpha())
    if not counts:
        return "none", False
    if "Kana" in counts:  # Japanese is written in both
        counts["Kana"] += counts.pop("Han", 0)
    name, most = max(counts.items(), key=lambda item: (item[1], item[0]))
    return name, counts.total() - most >= 0.1 * counts.total()


@lru_cache(2**16)
def script_of(letter: str) -> str:
    """The script of a letter: Latin, Cyrillic, Han, Kana, ..."""
    first = unicodedata.name(letter, "OTHER").split()[0].split("-")[0]
    if first in ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "FEMININE", "MASCULINE", "DOUBLE"):
        first = "LATIN" if "LATIN" in unicodedata.name(letter, "") else "OTHER"
    return _NAMES.get(first, first.capitalize())


_NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "MICRO": "Greek"}


def faults(caption: str) -> list[str]:
    """What an encoding or a cleaning step left behind: line by line for a table."""
    found = []
    if _BROKEN.search(caption):
        found.append("broken encoding")
    if not caption.isprintable() and any(unicodedata.category(c) == "Cc" and c != "\t" for c in caption):
        found.append("control characters")
    if not caption.isascii() and not unicodedata.is_normalized("NFC", caption):
        found.append("not in Unicode's NFC")
    if "&" in caption and html.unescape(caption) != caption:
        found.append("HTML entities")
    if "  " in caption or "\t" in caption:
        found.append("runs of spaces")
    return found


def readable(text: str, limit: int = 240) -> str:
    """Text for a page or a table: one line, without control characters, cut at `limit` characters."""
    text = text[: 2 * limit].encode("utf-8", "replace").decode()
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
