"""What a run was made of, and how to go on with it."""

from html import escape
from pathlib import Path
from typing import Any

from mm.report import software
from mm.report.elements import mean
from mm.report.history import History


def use(run: Path, history: History) -> str:
    """How to go on with a run."""
    where = escape(str(history.config.get("out") or run))
    program = "train.finetune" if "task" in history.config else "train.pretrain"
    call = _call(history.config.get("task"))
    pillow = "from PIL import Image\n" if "Image." in call else ""
    load = f"""import mm
{pillow}
model = mm.load("{where}")
{call}"""
    commands = f"""# evaluate on other sets
python -m eval.suite CONFIG model={where}
# go on where it stopped; or the same run again in another folder
python -m {program} {where}/config.yaml
python -m {program} {where}/config.yaml out=NEW
# look at it live; write this page again
tensorboard --logdir {where}
mm report {where}"""
    return f"<h2>Use it</h2><pre>{load}</pre><pre>{commands}</pre>"


def _call(task: Any) -> str:
    """How to ask a model what it was trained for; task: of a fine-tuning run's config, else None."""
    task = task if isinstance(task, dict) else {}
    video = task.get("reads") == "video" or "video" in str(task.get("modalities"))
    one = '"clip.mp4"' if video else 'Image.open("photo.jpg")'
    match task.get("kind"):
        case "classification" if task.get("objective") != "text":
            return f"print(model.classify([{one}]))  # probabilities of the classes"
        case "vqa" | "open_vqa":
            return f'print(model.answer([{one}], ["what is this?"]))'
        case "captioning":
            return f"print(model.caption([{one}]))"
        case "entailment":
            return (
                f'print(model.entail([{one}], [Image.open("other.jpg")], ["both show a dog"]))  # probability'
            )
    return f"""seen = model.encode_{"video" if video else "image"}([{one}])
texts = model.encode_text(["a red apple", "a green pear"])
print(seen @ texts.T)  # cosines"""


def about(history: History) -> str:
    """What the ledger holds, the config, and what it ran on."""
    bad = sorted(history.bad.items(), key=lambda item: -item[1])
    rows = "".join(f"<tr><td>{escape(reason)}</td><td>{count:,}</td></tr>" for reason, count in bad[:20])
    if bad:
        samples = (
            f"<p>{sum(history.bad.values()):,} samples could not be used and were replaced; each is named in "
            f"<code>bad_samples.jsonl</code>.</p><table>{rows}</table>"
        )
    else:
        samples = "<p>Every sample could be used.</p>"
    saves, stalls = (
        [(line["samples"], line[key]) for line in history.saves if isinstance(line.get(key), float)]
        for key in ("seconds", "stall")
    )
    stood = f"; training stood still for {mean(stalls):.2g} s of them" if stalls else ""
    saved = (
        f"<p>{len(saves)} checkpoints were written, {mean(saves):.2g} s each on average{stood}.</p>"
        if saves
        else ""
    )
    troubled = "".join(
        f"<tr><td>{line['step']:,}</td><td>{escape(str(line['event']))}</td>"
        f"<td>{escape(str(line.get('reason', 'its gradients are not finite')))}</td></tr>"
        for line in history.troubles[:20]
    )
    if troubled:
        saved += (
            f"<p>{len(history.troubles):,} steps would have done harm and did not reach the weights; their samples are "
            f"in <code>skipped_samples.jsonl</code>.</p><table>{troubled}</table>"
        )
    said = dict(history.start)
    told = said.pop("software", None)  # older runs did not say it
    lines = told if isinstance(told, list) else software.describe()
    facts = [f"{key.replace('_', ' ')}: {value}" for key, value in said.items()]
    versions = "<br>".join(escape(str(line)) for line in [*facts, *lines])
    config = escape(history.config_text) or "config.yaml is missing"
    return (
        f"<h2>About the run</h2>{samples}{saved}"
        f"<details><summary>Config</summary><pre>{config}</pre></details>"
        f'<details open><summary>Software and hardware</summary><p class="faint">{versions}</p></details>'
    )
