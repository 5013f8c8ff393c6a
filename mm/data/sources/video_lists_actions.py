"""UCF101 and HMDB51, by their three splits into train and test.

- UCF101: `classInd.txt` (`1 ApplyEyeMakeup`), `trainlist01.txt` (`ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`),
  `testlist01.txt` (paths alone).
- HMDB51: `CLASS_test_split1.txt`, lines of `FILE.avi MARK`, 1 for train, 2 for test, 0 for neither; the files lie in a
  folder for each class.
"""

import re

from mm.data.sources.annotations import shown
from mm.data.sources.output import Report
from mm.data.sources.video_files import Row
from mm.data.sources.video_lists import (
    ClassNames,
    ListedConfig,
    Listing,
    class_names,
    label_members,
    lines_of,
    lists_folder,
    read_class_names,
    split_name,
)
from mm.errors import UserError

UCF_CLASS = re.compile(r"v_([A-Za-z]+)_g\d+_c\d+")
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
UCF_SPLITS = {"train": "trainlist", "test": "testlist"}
HMDB_MARKS = {"train": "1", "test": "2"}


def ucf101(config: ListedConfig, report: Report) -> Listing:
    """A split of UCF101."""
    folder, split = lists_folder(config, "classInd.txt and trainlist01.txt"), _of_two(config, UCF_SPLITS)
    path = folder / f"{UCF_SPLITS[split]}{config.fold:02d}.txt"
    if config.names is None and not (folder / "classInd.txt").is_file():
        raise UserError(f"{folder} has no classInd.txt; give it as names=FILE")
    known = read_class_names(config.names or folder / "classInd.txt")
    classes = ClassNames(known, config.names or folder / "classInd.txt")
    spoken = [_spoken(name) for name in known]
    rows = []
    for line_number, line in lines_of(path):
        file, _, given = line.rpartition(" ") if line.rpartition(" ")[2].isdecimal() else (line, "", "")
        file = file.strip()
        place, _, name = file.rpartition("/")
        in_name = UCF_CLASS.match(name)
        label = place.rpartition("/")[2] or (in_name[1] if in_name else "")
        number = classes.number(label)
        item = f"line {line_number} of {path.name}"
        if number is None:
            report.skip(item, f"malformed row: {shown(line)} is of no class")
        elif given and config.names is None and int(given) != number + 1:
            report.skip(item, f"malformed row: class {given}, and {shown(label)} is {number + 1}")
        else:
            # the folder is HandstandPushups, the files in it v_HandStandPushups_*, which some renamed
            folders = (place, known[number], *([in_name[1]] if in_name else []), "", f"UCF-101/{place}")
            about = {"class": label, "split": split, "fold": config.fold}
            members = label_members(number, spoken[number])
            rows.append(Row(file, (name,), tuple(dict.fromkeys(folders)), members, about))
    return Listing(rows, spoken)


def _spoken(name: str) -> str:
    """`ApplyEyeMakeup` -> `apply eye makeup`; what has blanks already stays."""
    return name if " " in name else CAMEL.sub(" ", name).lower()


def hmdb51(config: ListedConfig, report: Report) -> Listing:
    """A split of HMDB51."""
    folder, split = lists_folder(config, "brush_hair_test_split1.txt, ..."), _of_two(config, HMDB_MARKS)
    ending = f"_test_split{config.fold}.txt"
    lists = {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*{ending}"))}
    if not lists:
        raise UserError(f"{folder} has no lists CLASS{ending}")
    classes = class_names(config, lists, folder)
    rows = []
    for place, path in lists.items():
        number = classes.number(place)
        if number is None:
            report.skip(shown(path.name), "class that is not among the names")
            continue
        for line_number, line in lines_of(path):
            file, _, mark = line.rpartition(" ")
            file = file.strip()
            if not file or mark not in ("0", "1", "2"):
                report.skip(f"line {line_number} of {shown(path.name)}", f"malformed row: {shown(line)}")
            elif mark == HMDB_MARKS[split]:
                about = {"class": place, "split": split, "fold": config.fold}
                members = label_members(number, classes.names[number])
                # unpacking may put the folder of a class into another of its name
                folders = (place, "", f"{place}/{place}")
                rows.append(Row(f"{place}/{file}", (file,), folders, members, about))
    return Listing(rows, classes.names)


def _of_two(config: ListedConfig, splits: dict[str, str]) -> str:
    """The split asked for. UserError where that is neither."""
    if split_name(config.split) not in splits:
        given = "missing" if config.split is None else f"{config.split} is unknown"
        raise UserError(f"split: {given}; give split=train or split=test")
    return split_name(config.split)
