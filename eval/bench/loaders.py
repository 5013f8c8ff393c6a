"""Loaders of image-text pairs as their users write them, each in a process that works when it is told to.

`python -m eval.bench.loaders NAME SETTINGS.json` answers lines on standard input: `read N` takes N batches and
prints what they took, `memory` prints the bytes of each worker. All give float images (B, 3, 224, 224),
normalised, and the tokens of open_clip's tokenizer. The peers decode with Pillow and transform with
open_clip's training transform, which is torchvision's.
"""

import io
import json
import os
import resource
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image

SIZE = 224
ENDLESS = 1000
"""Epochs that a list of shards is repeated for, where a loader ends otherwise."""

ENERGON_BUFFER = 200  # it shuffles decoded pixels: 5,000 samples of them took 9 GB a worker


class Settings(NamedTuple):
    """What each loader is told."""

    shards: str
    """Folder of tars."""
    folder: str
    """Where a peer may write the set in its own format."""
    samples: int
    """In the shards."""
    workers: int
    batch: int
    buffer: int
    """Samples in the shuffle buffer of a worker, for loaders that have one."""

    def tars(self) -> list[str]:
        return sorted(str(path) for path in Path(self.shards).glob("*.tar"))


class Preparation:
    """open_clip's training transform and tokenizer; pickles to workers."""

    def __init__(self) -> None:
        import open_clip

        self.image: Callable[[Image.Image], torch.Tensor] = open_clip.image_transform(SIZE, is_train=True)
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def text(self, text: str) -> torch.Tensor:
        tokens: torch.Tensor = self.tokenizer(text)[0]
        return tokens

    def members(self, members: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the bytes and the text of a sample."""
        image = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
        return self.image(image), self.text(members["txt"])


def ours(settings: Settings) -> Generator[Any, None, None]:
    import open_clip

    from mm.data.stream import Stream, StreamConfig
    from mm.data.transforms import AugmentConfig, TrainTransform
    from mm.encoders.open_clip import OpenClipTokenizer
    from mm.tasks.contrastive import PairPreparation

    tokenizer: Any = OpenClipTokenizer(open_clip.get_tokenizer("ViT-B-32"), 77)
    preparation: Any = PairPreparation(TrainTransform(SIZE, AugmentConfig()), tokenizer)
    config = StreamConfig(shards=settings.shards, workers=settings.workers)
    stream = Stream(config, preparation, preparation.collate, global_batch=settings.batch, seed=0)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    for streamed in stream:
        (batch,) = streamed.batch
        # as the encoder does it
        yield batch["images"].float().div_(255).sub_(mean).div_(std), batch["input_ids"]


def open_clip_loader(settings: Settings) -> Generator[Any, None, None]:
    """`open_clip_train.data.get_wds_dataset`."""
    from open_clip_train import data

    data._SAMPLE_SHUFFLE_SIZE = settings.buffer
    data._SAMPLE_SHUFFLE_INITIAL = min(1000, settings.buffer)
    args = Namespace(
        train_data="::".join(settings.tars() * ENDLESS),
        train_num_samples=settings.samples * ENDLESS,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=settings.batch,
        workers=settings.workers,
        world_size=1,
        seed=0,
    )
    prepare = Preparation()
    info = data.get_wds_dataset(args, prepare.image, is_train=True, tokenizer=prepare.tokenizer)
    yield from info.dataloader


def webdataset(settings: Settings) -> Generator[Any, None, None]:
    """The pipeline of webdataset's README."""
    import webdataset as wds

    prepare = Preparation()
    dataset = (
        wds.WebDataset(settings.tars() * ENDLESS, shardshuffle=100, nodesplitter=wds.split_by_node)
        .shuffle(settings.buffer)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(prepare.image, prepare.text)
        .batched(settings.batch)
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=settings.workers)


def streaming(settings: Settings) -> Generator[Any, None, None]:
    """`StreamingDataset` over MDS shards, which hold the same bytes."""
    from streaming import MDSWriter, Stream, StreamingDataset
    from torch.utils.data import DataLoader

    folder = Path(settings.folder) / "mds"
    if not (folder / "index.json").exists():
        with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as writer:
            for members in _members(settings):
                writer.write(members)
    prepare = Preparation()

    class Pairs(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, at: Any) -> Any:
            return prepare.members(super().__getitem__(at))

    streams = [Stream(local=str(folder), repeat=ENDLESS)]
    dataset = Pairs(streams=streams, shuffle=True, batch_size=settings.batch)
    yield from DataLoader(dataset, batch_size=settings.batch, num_workers=settings.workers)


def litdata(settings: Settings) -> Generator[Any, None, None]:
    """`litdata.StreamingDataset` over chunks of 64 MB, which hold the same bytes."""
    import litdata as ld

    folder = Path(settings.folder) / "litdata"
    if not (folder / "index.json").exists():
        inputs = list(_members(settings))
        ld.optimize(_itself, inputs, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)
    dataset = ld.StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=Preparation().members)
    loader = ld.StreamingDataLoader(dataset, batch_size=settings.batch, num_workers=settings.workers)
    while True:
        yield from loader


def energon(settings: Settings) -> Generator[Any, None, None]:
    """A task encoder over `CaptioningSample`s of the same tars."""
    import megatron.energon as en

    folder = Path(settings.folder) / "energon"
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for tar in settings.tars():
            (folder / Path(tar).name).unlink(missing_ok=True)
            os.link(tar, folder / Path(tar).name)
        command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive"]
        fields = json.dumps({"image": "jpg", "caption": "txt"})
        options = ["--split-ratio=1,0,0", "--sample-type=CaptioningSample", f"--field-map={fields}"]
        subprocess.run([*command, *options, "--num-workers=1", str(folder)], check=True, stdout=sys.stderr)
    prepare = Preparation()

    class Pairs(en.DefaultTaskEncoder):  # type: ignore[misc, unused-ignore]
        decoder = en.SampleDecoder(image_decode="pilrgb")

        @en.stateless
        def encode_sample(self, sample: Any) -> Any:
            sample.image, sample.caption = prepare.image(sample.image), prepare.text(sample.caption)
            return sample

    dataset = en.get_train_dataset(
        str(folder),
        task_encoder=Pairs(),
        batch_size=settings.batch,
        shuffle_buffer_size=min(settings.buffer, ENERGON_BUFFER),
        max_samples_per_sequence=None,
        worker_config=en.WorkerConfig(rank=0, world_size=1, num_workers=settings.workers),
    )
    for batch in en.get_loader(dataset):
        yield batch.image, batch.caption


LOADERS: dict[str, Callable[[Settings], Generator[Any, None, None]]] = {
    "ours": ours,
    "open_clip": open_clip_loader,
    "webdataset": webdataset,
    "streaming": streaming,
    "litdata": litdata,
    "energon": energon,
}


def _members(settings: Settings) -> Iterator[dict[str, Any]]:
    from mm.data.shards import ShardSet

    for sample in ShardSet(settings.shards):
        yield {"jpg": sample.members["jpg"], "txt": sample.members["txt"].decode()}


def _itself(members: dict[str, Any]) -> dict[str, Any]:
    return members


def cpu_seconds() -> float:
    """Of this process and all that it started, those that are gone included."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + gone.ru_utime + gone.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def worker_bytes() -> list[int]:
    """Memory of each process below this one that no other shares (USS)."""
    return [process.memory_full_info().uss for process in psutil.Process().children(recursive=True)]


def main(name: str, settings: Settings) -> None:
    # what libraries print must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loader = LOADERS[name](settings)
    for line in sys.stdin:
        order, _, count = line.strip().partition(" ")
        if order == "memory":
            answer: dict[str, Any] = {"workers": worker_bytes()}
        else:
            wall, cpu, samples = time.perf_counter(), cpu_seconds(), 0
            for _ in range(int(count)):
                images, texts = next(loader)[:2]
                assert images.shape[1:] == (3, SIZE, SIZE) and images.is_floating_point()
                assert len(texts) == len(images)
                samples += len(images)
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            answer = {"wall": wall, "cpu": cpu, "samples": samples}
        print(json.dumps(answer), file=answers, flush=True)
    loader.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Settings(**json.loads(Path(sys.argv[2]).read_text())))
