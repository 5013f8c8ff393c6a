"""The four faces of quality - accuracy, completeness, consistency, representativeness - each with a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from mm.data.curation.measure import SMALL_SIDE
from mm.data.curation.sketches import Json
from mm.data.curation.wording import KINDS

STATES = ("good", "look", "poor")
TITLES = {
    "accuracy": "Is each sample what it claims to be?",
    "completeness": "Is all there that should be?",
    "consistency": "Is it all of one kind?",
    "representativeness": "Does it cover what it should, evenly?",
}


@dataclass
class Finding:
    """One figure of a face. From `look` on it deserves a look, from `poor` on it is a fault of the data."""

    label: str
    text: str
    value: float = 0.0
    look: float | None = None
    poor: float | None = None
    says: str = ""
    """the verdict when it is too high"""

    @property
    def state(self) -> int:
        """0 good, 1 look, 2 poor."""
        if self.poor is not None and self.value >= self.poor:
            return 2
        return int(self.look is not None and self.value >= self.look)

    @property
    def weight(self) -> tuple[int, float]:
        """Which of several findings is told first."""
        return self.state, self.value / (self.poor or self.look or 1.0)


def quality(summary: Json) -> Json:
    """The faces by name: state, verdict, figures."""
    makers = {
        "accuracy": (_accuracy, "samples can be read, and captions look like captions"),
        "completeness": (_completeness, "no member, caption or field is missing to speak of"),
        "consistency": (_consistency, "formats, keys, members and fields follow one convention"),
        "representativeness": (_representativeness, "no caption, image or group dominates"),
    }
    return {name: _face(find(summary), fine) for name, (find, fine) in makers.items()}


def _face(findings: Sequence[Finding], fine: str) -> Json:
    worst = sorted((one for one in findings if one.state), key=lambda one: one.weight, reverse=True)
    verdict = "; ".join(one.says or f"{one.label.lower()}: {one.text}" for one in worst[:3]) or fine
    more = f"; {len(worst) - 3} more below" if len(worst) > 3 else ""
    return {
        "state": STATES[max((one.state for one in findings), default=0)],
        "verdict": verdict[0].upper() + verdict[1:] + more + ".",
        "figures": [
            {"label": one.label, "text": one.text, "value": one.value, "state": STATES[one.state]}
            for one in findings
        ],
    }


def percent(share: float) -> str:
    """A share for a reader: 0%, 0.02%, 3.1%, 42%."""
    if share and abs(share) < 0.00005:
        return "<0.01%"
    if 0.995 <= share < 1:
        return f"{100 * min(share, 0.9999):.2f}%"
    return f"{100 * share:.{2 if abs(share) < 0.001 else 1 if abs(share) < 0.1 else 0}f}%" if share else "0%"


def _share(
    label: str,
    part: float,
    whole: float,
    look: float | None = None,
    poor: float | None = None,
    says: str = "",
    error: float = 0,
) -> Finding:
    """A share of something; `says` may hold {} for it. error: one standard error of the share."""
    share = part / whole if whole else 0.0
    text = percent(share) + (f" ± {percent(error)}" if error else "")
    if part and isinstance(part, int) and part != whole:
        text += f" ({part:,.0f})"
    return Finding(label, text, share, look, poor, says.replace("{}", percent(share)))


def _accuracy(summary: Json) -> list[Finding]:
    counts, tallies = _Counts(summary), summary["tallies"]
    samples, captions = counts["samples"], counts.captions
    unusable = samples - counts["usable"]
    decoded = summary.get("settings", {}).get("decode", True)
    kinds = {kind: number for kind, number, _ in tallies["kinds"]["top"]}
    odd = sum(kinds.values())
    worst = max(kinds, key=lambda kind: kinds[kind], default="")
    mostly = f", mostly {KINDS[worst]}" if len(kinds) > 1 else f": {KINDS[worst]}" if kinds else ""
    found = [
        _share(
            "Samples with a problem",
            unusable,
            samples,
            0.001,
            0.02,
            "{} of the samples cannot be used as they are",
        ),
        _share(
            "Images that cannot be decoded"
            if decoded
            else "Images whose header cannot be read (none was decoded)",
            counts["bad_image"],
            samples,
            0.0005,
            0.01,
            "{} of the images cannot be " + ("decoded" if decoded else "opened"),
        ),
        _share(
            "Captions that do not look like captions",
            odd,
            captions,
            0.01,
            0.1,
            "{} of the captions do not look like captions" + mostly,
        ),
        *(_share(f"– {text}", kinds[kind], captions) for kind, text in KINDS.items() if kinds.get(kind)),
        _share("Captions of one word", counts["one_word"], captions),
        _share(f"Images under {SMALL_SIDE} pixels a side", counts["small"], counts["images"], 0.01, 0.2),
    ]
    close = summary["similarity"]
    if not close:
        found.append(Finding("Similarity of image and caption", "not measured: give model=RUN"))
    else:
        found += [
            Finding(
                "Similarity of image and caption",
                f"{close['matched_mean']:.3f}, shuffled {close['shuffled_mean']:.3f}",
            ),
            _share(
                "Pairs less alike than the middle shuffled pair",
                close["below_shuffled_median"],
                1,
                0.05,
                0.2,
                "{} of the pairs are less alike to this model than the middle one of shuffled pairs",
            ),
            _share("Pairs more alike than a shuffled one", close["more_alike_than_shuffled"], 1),
        ]
    return found


def _completeness(summary: Json) -> list[Finding]:
    counts, shards = _Counts(summary), summary["shards"]
    samples, objects = counts["samples"], counts["json"]
    expected = shards["expected_samples"]
    found = [
        _share(
            "Shards that cannot be opened", shards["broken_count"], shards["count"], 1e-9, 0.01,
            "{} of the shards cannot be opened",
        ),
        _share(
            "Samples damaged in their shard", counts["damaged"], samples, 1e-9, 0.01,
            "{} of the samples are damaged in their shards",
        ),
        _share("Samples without an image", counts["no_image"], samples, 0.001, 0.02, "{} have no image"),
        _share(
            "Samples without a caption that can be read", counts["no_caption"], samples, 0.001, 0.02,
            "{} have no caption that can be read",
        ),
        _share(
            "Samples with an empty member", min(counts["empty_members"], samples), samples, 0.001, 0.02,
            "{} have an empty member",
        ),
        _share("Samples with a class instead of a caption", counts["labelled"], samples),
        _share("Samples with a json", objects, samples),
    ]  # fmt: skip
    if expected is not None:
        found.append(Finding("Samples by sizes.json", f"{expected:,}, found {samples:,}"))
    if objects:
        rates = fill_rates(summary)
        gaps = [name for name, present, filled, _ in rates if filled < 0.9 * objects]
        found += [
            _share(
                "Json that cannot be read", counts["bad_json"], objects, 0.001, 0.02, "{} of the json cannot be read"
            ),
            _share("Json that is no object", counts["json_no_object"], objects, 0.001, 0.02),
            _share(
                "Json keys filled in less than 90% of them", len(gaps), len(rates), 1e-9, None,
                f"{_some(gaps)} {'is' if len(gaps) == 1 else 'are'} often missing or empty in the json",
            ),
        ]  # fmt: skip
    return found


def _consistency(summary: Json) -> list[Finding]:
    counts, tallies = _Counts(summary), summary["tallies"]
    samples, images, captions = counts["samples"], counts["images"], counts.captions
    shards, keys = summary["shards"], summary["repeats"]["keys"]
    mixed = sorted(
        name
        for name, _, _, types in fill_rates(summary)
        if len(types) > 1 and sum(types.values()) - max(types.values()) > 0
    )
    faults = tallies["faults"]["top"]
    faulty = sum(number for _, number, _ in faults)
    return [
        _share(
            "Shards whose size is not that of sizes.json", shards["wrong_size_count"], shards["count"], 1e-9, 0.01,
            "sizes.json is wrong for {} of the shards",
        ),
        _share(
            "Keys used more than once", keys["repeated"], 1, 0.0001, 0.01, "{} of the keys are used again",
            keys["repeated_error"],
        ),
        _several("Members of a sample", tallies["members"], samples, "{} of the samples have other members"),
        _several("Ways to build a key", tallies["keys"], samples, "{} of the keys are built otherwise"),
        _several("Image formats", tallies["formats"], images, "formats are mixed: {} are not {}", 0.2),
        _several("Colour modes", tallies["modes"], images, "colour modes are mixed: {} are not {}", 0.2),
        _share(
            "Images of another format than their name says", counts["wrong_suffix"], images, 0.01, 0.5,
            "{} of the images are of another format than their name says",
        ),
        _share("Images turned by EXIF", counts["turned"], images),
        _share("Animated images (the first frame counts)", counts["animated"], images, 0.01),
        Finding("Captions a sample", _range(summary["histograms"]["captions"])),
        _share(
            "Traces of encodings and markup in captions", min(faulty, captions), captions, 0.01, 0.2,
            "{} of the captions bear traces of a broken encoding or of markup",
        ),
        *(_share(f"– {text}", number, captions) for text, number, _ in faults),
        _share("Captions that mix scripts", counts["mixed_scripts"], captions, 0.1),
        Finding(
            "Json keys of several types", f"{len(mixed)}", len(mixed), 1, None,
            f"{_some(mixed)} {'has' if len(mixed) == 1 else 'have'} values of several types in the json",
        ),
    ]  # fmt: skip


def _representativeness(summary: Json) -> list[Finding]:
    repeats, balances = summary["repeats"], summary["balance"]
    images, captions = repeats["images"], repeats["captions"]
    found = [
        _share(
            "Images that repeat an earlier one", images["repeated"], 1, 0.01, 0.1,
            "{} of the images are there already", images["repeated_error"],
        ),
        _share(
            "Captions that repeat an earlier one", captions["repeated"], 1, 0.2, 0.5,
            "{} of the captions are there already", captions["repeated_error"],
        ),
    ]  # fmt: skip
    if "captions" in balances:
        most = balances["captions"]
        found.append(
            _share(
                "Share of the most frequent caption", most["largest_share"], 1, 0.01 if most["total"] > 500 else None,
                0.1 if most["total"] > 500 else None, "one caption makes up {} of all",
            )
        )  # fmt: skip
    if "words" in balances:
        words = balances["words"]
        found.append(Finding("Different words", _number(words, "values")))
        found.append(Finding("Effective number of words", _number(words, "effective_values")))
    if "scripts" in balances:
        top = balances["scripts"]["top"]
        text = ", ".join(f"{name} {percent(n / balances['scripts']['total'])}" for name, n in top[:3])
        found.append(Finding("Scripts", text))
    for name, group in balances.items():
        if not name.startswith("json:"):
            continue
        label = name.removeprefix("json:")
        few = group["values"] < 2
        found += [
            Finding(
                f"Groups of {label}",
                f"{_number(group, 'values')}, effective number {_number(group, 'effective_values')}",
            ),
            Finding(f"– entropy of {label}", f"{group['entropy_bits']:.2f} bits"),
            _share(
                f"– largest of {label}", group["largest_share"], 1, None if few else max(0.3, 3 / group["values"]),
                None if few else 0.8, f"{label} {group['top'][0][0]!r} makes up {{}}",
            ),
            Finding(f"– Gini of {label}", f"{group['gini']:.2f}", group["gini"], 0.7, None,
                    f"{label} is very unevenly filled (Gini {group['gini']:.2f})"),
            _share(
                f"– near-empty groups of {label}", group["near_empty"], group["values"], 0.2, None,
                f"{{}} of the groups of {label} hold less than a tenth of the mean",
            ),
        ]  # fmt: skip
    for name, label in (("width", "Widths"), ("height", "Heights"), ("aspect", "Aspect ratios")):
        if summary["histograms"][name]:
            found.append(Finding(f"{label}, middle 90%", _middle(summary["histograms"][name])))
    return found


def fill_rates(summary: Json) -> list[tuple[str, int, int, dict[str, int]]]:
    """Of every json key: name, objects that have it, those where it is not empty, and the types of the entries."""
    tallies = summary["tallies"]
    filled = {name: number for name, number, _ in tallies["json_filled"]["top"]}
    types: dict[str, dict[str, int]] = {}
    for text, number, _ in tallies["json_types"]["top"]:
        name, _, kind = text.partition("\t")
        types.setdefault(name, {})[kind] = number
    return [
        (name, present, filled.get(name, 0), types.get(name, {}))
        for name, present, _ in tallies["json_present"]["top"]
    ]


class _Counts:
    """The counts of a summary, 0 where nothing was counted."""

    def __init__(self, summary: Json):
        self._counts, self._histograms = summary["counts"], summary["histograms"]

    def __getitem__(self, name: str) -> int:
        return int(self._counts.get(name, 0))

    @property
    def captions(self) -> int:
        return int(self._histograms["characters"].get("count", 0))


def _several(label: str, tally: Json, whole: int, says: str, look: float = 0.02) -> Finding:
    """How many kinds there are, and the share of all but the most frequent."""
    top = tally["top"]
    if not top:
        return Finding(label, "none")
    first, most, _ = top[0]
    share = 1 - most / whole if whole else 0.0
    text = f"{len(top)}{'+' if not tally['exact'] else ''}: {first} {percent(most / whole if whole else 0)}"
    if len(top) == 1 and most == whole:
        text = first
    return Finding(label, text, share, look, None, says.format(percent(share), first))


def _range(histogram: Json) -> str:
    if not histogram:
        return "none"
    low, high = histogram["min"], histogram["max"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, on average {histogram['mean']:.3g}"


def _middle(histogram: Json) -> str:
    low, high = f"{histogram['p5']:,.4g}", f"{histogram['p95']:,.4g}"
    return low if low == high else f"{low} to {high}"


def _number(group: Json, name: str) -> str:
    digits = 1 if name == "effective_values" and group[name] < 100 else 0
    return f"{'' if group['exact'] else 'at least '}{group[name]:,.{digits}f}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
