"""The command `mm`: reads its arguments, and hands over."""

import difflib
import importlib
import json
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from mm.errors import UserError

HELP = """usage: mm COMMAND ...

  mm data make SOURCE [key=value ...]   write shards from a public source, a folder or a table of images
  mm data index SHARDS ...              write sizes.json and member offsets for shards that exist
  mm data check SHARDS ...              what is damaged, missing or there twice
  mm data stats SHARDS ...              sizes, captions, words, quality: figures and a page with examples
  mm data filter SHARDS ... out=FOLDER  leave out what rules, near duplicates, a model or balancing say
  mm data plan SHARDS ... batch=N       what a run will read, cache and mix, before it is started
  mm plan CONFIG nodes=N gpu=h100       what a run will need: memory, hours, network, disk; needs no GPU
  mm runs [FOLDER ...]                  how far the runs of a folder are, and which are alive
  mm stop RUN ...                       have runs end after their step, saved: the same command goes on
  mm report RUN                         write the page RUN/report.html again
  mm report RUN RUN ...                 runs side by side on one page: curves, figures, configs
  mm export RUN format=... out=FOLDER   a model for open_clip, transformers or ONNX, proven equal
  mm explain RUN image=FILE text=...    which pixels and words a score rests on, as a picture

mm COMMAND --help says more about each and lists its keys. Training and evaluation are programs of their own:
  python -m train.pretrain --help       python -m eval.suite --help
"""
INDEX_HELP = """usage: mm data index SHARDS ...

SHARDS: folders, files or patterns such as 'data/cc3m/{00000..00331}.tar' of webdataset or img2dataset.
Writes NAME.idx beside each shard, and sizes.json in its folder: training reads them.
"""
REPORT_HELP = """usage: mm report RUN [gallery=SET] [queries=8] [top=5]
       mm report RUN RUN ... [out=comparison.html] [suite=NAME]

RUN: the folder of a run, finished or not. Writes RUN/report.html from what the run left there; gallery=SET opens its
model, too, and pictures a set of its config, of retrieval or of questions. Of several runs it writes one page that
compares the others with the first: curves, figures of eval.suite with what is significant, configs.
"""
PLAN_HELP = """usage: mm plan CONFIG [key=value ...] [nodes=1] [gpus_per_node=8] [gpu=a100-80] [json=true]

CONFIG: of train.pretrain or train.finetune (with model=RUN, or the config of a run that is still to come); its keys
can be given too. Prints the memory of a GPU by part under ZeRO 0 to 3, operations, an estimate of samples a second and
of hours, what the network carries, checkpoints and what is read; and what would help where it does not fit. Nothing is
downloaded. mm plan --help lists all keys.
"""
RUNS_HELP = """usage: mm runs [FOLDER ...] [json=true]

FOLDER: holds run folders, or is one; runs/ by default. Prints a table, the run with the newest line first; json=true: a
JSON object a line, for scripts. States: running, finished, failed (by an error), stopped (it was asked to, or its
process is gone), unknown (it is on another machine: see how old its last line is), not begun (no line yet).
"""
STOP_HELP = """usage: mm stop RUN ...

RUN: the folder of a run, on this machine or another one that shares the folder. It finishes its step, saves and ends
with exit status 75 (under torchrun 0), as it does at SIGTERM and SIGUSR1; the same command goes on exactly.
"""


TOOLS = {  # command -> module, class of its config
    "check": ("mm.data.curation.check", "CheckConfig"),
    "stats": ("mm.data.curation.stats", "StatsConfig"),
    "filter": ("mm.data.curation.filter", "FilterConfig"),
    "plan": ("mm.data.plan", "PlanConfig"),
}


def main() -> NoReturn:
    """Entry of the console script."""
    from mm.program import run

    run(dispatch)


def dispatch(argv: list[str]) -> None:
    """Run the command that the arguments name. UserError when there is none of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    _pick(
        {
            "data": data,
            "plan": plan,
            "report": report,
            "export": export,
            "explain": explain,
            "runs": runs,
            "stop": stop,
        },
        argv[0],
        "command",
    )(argv[1:])


def data(argv: list[str]) -> None:
    """`mm data make|index|check|stats|filter|plan`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    tools = {name: partial(tool, name) for name in TOOLS}
    _pick({"make": make, "index": index, **tools}, argv[0], "command mm data")(argv[1:])


def make(argv: list[str]) -> None:
    """`mm data make SOURCE [key=value ...]`."""
    from mm.data.make import about_sources, find, make_from

    if not argv or argv[0] in ("-h", "--help"):
        print(about_sources(), end="")
        return
    source, *rest = argv
    if "-h" in rest or "--help" in rest:
        from mm.config import parse

        parse(find(source).config, ["--help"], f"mm data make {source}")
    for argument in rest:
        if argument.startswith("-") or "=" not in argument:
            raise UserError(f"{argument}: expected key=value; mm data make {source} --help lists the keys")
    make_from(source, rest)


def index(argv: list[str]) -> None:
    """`mm data index SHARDS ...`."""
    if not argv or "-h" in argv or "--help" in argv:
        print(INDEX_HELP, end="")
        return
    from mm.data.catalog import index_shards

    found = index_shards(argv)
    print(f"indexed {len(found):,} shards with {found.samples:,} samples")


def tool(name: str, argv: list[str]) -> None:
    """`mm data TOOL SHARDS ... [CONFIG.yaml] [key=value ...]`."""
    from mm.config import parse

    module, config = TOOLS[name]
    code = importlib.import_module(module)
    shards = [word for word in argv if not word.startswith("-") and "=" not in word and word[-5:] != ".yaml"]
    rest = [word for word in argv if word not in shards]
    named = [f"shards={json.dumps(shards)}"] if shards else []
    code.run(parse(getattr(code, config), [*rest, *named], f"mm data {name} SHARDS ..."))


def plan(argv: list[str]) -> None:
    """`mm plan CONFIG [key=value ...] [json=true]`."""
    if not argv:
        print(PLAN_HELP, end="")
        return
    from mm.plan import run

    run(argv)


def report(argv: list[str]) -> None:
    """`mm report RUN ... [key=value ...]`."""
    if not argv or "-h" in argv or "--help" in argv:
        print(REPORT_HELP, end="")
        return
    from mm.config import parse
    from mm.report import PageConfig, run

    folders = [word for word in argv if not word.startswith("-") and "=" not in word and word[-5:] != ".yaml"]
    rest = [word for word in argv if word not in folders]
    named = [f"runs={json.dumps(folders)}"] if folders else []
    run(parse(PageConfig, [*rest, *named], "mm report RUN ..."))


def runs(argv: list[str]) -> None:
    """`mm runs [FOLDER ...] [json=true]`."""
    if "-h" in argv or "--help" in argv:
        print(RUNS_HELP, end="")
        return
    from mm.runs import as_json, find, show

    keys = [word for word in argv if word.startswith("-") or "=" in word]
    for word in keys:
        if word not in ("json=true", "json=false"):
            raise UserError(f"{word}: mm runs takes folders and json=true")
    folders = [word for word in argv if word not in keys] or ["runs"]
    found = find(folders)
    if keys[-1:] == ["json=true"]:
        print("".join(f"{as_json(run)}\n" for run in found), end="")
    elif found:
        show(found)
    else:
        print(f"no runs in {', '.join(folders)}")


def stop(argv: list[str]) -> None:
    """`mm stop RUN ...`."""
    if not argv or "-h" in argv or "--help" in argv:
        print(STOP_HELP, end="")
        return
    from mm.stopping import ask

    ask(argv)


def export(argv: list[str]) -> None:
    """`mm export RUN format=... out=FOLDER [key=value ...]`."""
    from mm.config import parse
    from mm.export import ExportConfig, run

    run(parse(ExportConfig, _of_model(argv, "export"), "mm export RUN"))


def explain(argv: list[str]) -> None:
    """`mm explain RUN image=FILE [key=value ...]`."""
    from mm.config import parse
    from mm.explain import ExplainConfig, run

    run(parse(ExplainConfig, _of_model(argv, "explain"), "mm explain RUN"))


def _of_model(argv: list[str], command: str) -> list[str]:
    """The arguments with the model, which is named without `model=`, as a key too."""
    models = [word for word in argv if not word.startswith("-") and "=" not in word and word[-5:] != ".yaml"]
    if len(models) > 1:
        raise UserError(f"mm {command} takes one model, and was given {len(models)}: {' '.join(models)}")
    rest = [word for word in argv if word not in models]
    return [*rest, *(f"model={json.dumps(word)}" for word in models)]


def _pick(
    commands: dict[str, Callable[[list[str]], None]], name: str, what: str
) -> Callable[[list[str]], None]:
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no {what} {name!r}; {meant}known: {', '.join(commands)}")
    return commands[name]


if __name__ == "__main__":
    main()
