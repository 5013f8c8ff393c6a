"""The class numbers of a training set, read before the run: without its images."""

from collections.abc import Sequence

from mm.data.catalog import expand
from mm.data.decode import BadSample
from mm.data.questions import label
from mm.data.remote import is_remote
from mm.data.shards import Sample, ShardSet
from mm.errors import UserError


def count_labels(shards: str | Sequence[str], classes: int) -> dict[int, int] | None:
    """Class -> samples, for every class from 0 to `classes` - 1; without those whose label cannot be read.

    Shards behind URLs are not read beforehand: None where there is one.
    Raises UserError for a label that is no class, naming the sample.
    """
    counts = dict.fromkeys(range(classes), 0)
    if any(map(is_remote, expand(shards))):
        return None
    found = ShardSet(shards)
    for shard, size in enumerate(found.sizes.tolist()):
        for index in range(size):
            try:
                member = found.member(shard, index, "cls")
                number = label(Sample("", "", {} if member is None else {"cls": member}))
            except BadSample:
                continue
            if number not in counts:
                raise UserError(
                    f"sample {found.name(shard, index)} of {found.paths[shard]} has class {number}, but there are "
                    f"{classes} class names (from 0); mend task.classnames or the labels"
                )
            counts[number] += 1
    found.close()
    return counts
