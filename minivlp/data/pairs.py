"""Pictures with captions: one loader for every source, and the tensors that training reads.

`load_pairs` is the one door. It gives a Hugging Face `Dataset` with the columns `image` and `captions`, whether the
pairs come from the drawn picture book, from Flickr8k, from a folder or from a parquet file. `to_tensors` decodes
it once into uint8 tensors; `Batches` cuts them into training batches.

Shapes: N pictures, B batch, H height, W width in pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import LongTensor, Tensor

from minivlp.data.errors import DataError, DataWarning
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, SIZES, SKIES, WEATHERS, Scene
from minivlp.data.text import TokenTable

if TYPE_CHECKING:  # heavy imports wait until they are needed, so that importing the package stays quick
    import datasets
    import pyarrow as pa

DEFAULT_SIZES = {"train": 20_000}  # pictures drawn when `n` is not given
OTHER_SIZE = 1_000
MAX_PIXELS = 50_000_000  # a larger picture is left out: decoded it would take over 150 MB
ACCEPTED = '"picturebook", "flickr8k", a folder with a metadata.jsonl or parquet files, or a parquet file'
FLICKR8K = "jxie/flickr8k"
SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "validation": "val", "valid": "val", "dev": "val"}
SINGLE_FACTS = {"kind": KINDS, "colour": tuple(COLOURS), "size": SIZES}  # of a picture's only thing
SCENE_FACTS = {"place": PLACES, "sky": SKIES, "weather": WEATHERS}
CACHE_FORMAT = 1  # raise it when the columns of a cached file change

# A row on its way in: its name for messages, the picture, and one text or a list of texts.
Row = tuple[str, Any, Any]


def load_pairs(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    n: int | None = None,
    tier: str = "normal",
    image_size: int = 64,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Pictures with captions from any source, as a `Dataset` with `image` (RGB square) and `captions` (list of str).

    `name` is one of
    - "picturebook": drawn at first use, then read from the cache. `tier` is easy, normal or hard, `seed` chooses the
      book. Further columns: `scene` (every fact, json), `web_caption` and `web_noise` (a noisy caption and what is
      wrong with it), `questions` (list of question, answer, type);
    - "flickr8k": photos from the Hugging Face Hub, decoded once and cached;
    - a folder in the `imagefolder` convention (pictures and a metadata.jsonl with `file_name` and `captions`,
      `caption` or `text`), or with parquet files; a split is a subfolder or the beginning of a file's name;
    - a parquet file with `image` and `captions`, `caption`, `text` or `caption_0`, `caption_1`...

    `n` is how many pictures to take from the start (the picture book draws that many, by default 20,000 in train and
    1,000 elsewhere; other sources may have fewer), `image_size` their side in pixels. Photos are cropped at the
    centre, transparency becomes white. The cache is `cache_dir`, else the environment variable MINIVLP_CACHE, else
    ~/.cache/minivlp.

    Rows that cannot be used are left out, counted and named in one DataWarning. Raises DataError if none is left, or
    if the source, split or column does not exist.
    """
    if n is not None and n < 1:
        raise DataError(f"n={n} asks for no pictures: use 1 or more, or leave it out")
    if image_size < 1:
        raise DataError(f"image_size={image_size} is no picture: give the side in pixels, for example 64")
    options = {"n": n, "image_size": image_size, "progress": progress}
    if name == "picturebook":
        return _picturebook(split, tier=tier, seed=seed, cache=_cache_folder(cache_dir), **options)
    if name == "flickr8k":
        return _flickr8k(split, cache=_cache_folder(cache_dir), **options)
    return _local(Path(name).expanduser(), split, **options)


# ---- in memory ----


@dataclass
class PairTensors:
    """A data set decoded once: `images` uint8 (N, 3, H, W), `captions` N lists, `scenes` for the picture book."""

    images: Tensor
    captions: list[list[str]]
    scenes: list[Scene] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int] | Tensor | slice) -> PairTensors:
        """The chosen pictures, in the order given: indices, a slice, or a bool mask (N,)."""
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        chosen = torch.as_tensor(list(indices) if isinstance(indices, range) else indices)
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.long()
        rows = chosen.tolist()
        return PairTensors(
            images=self.images[chosen],
            captions=[self.captions[i] for i in rows],
            scenes=None if self.scenes is None else [self.scenes[i] for i in rows],
        )

    def labels(self, fact: str) -> tuple[LongTensor, tuple[str, ...]]:
        """One class per picture (N,) and the names of the classes.

        `fact` is kind, colour or size, for pictures that show exactly one thing, or place, sky or weather. Raises
        DataError for another fact, for pictures without scenes, or for pictures with several things.
        """
        names = (SINGLE_FACTS | SCENE_FACTS).get(fact)
        if names is None:
            raise DataError(f"there are no labels for {fact!r}: choose from {', '.join(SINGLE_FACTS | SCENE_FACTS)}")
        if self.scenes is None:
            raise DataError("these pictures come without scenes, so nothing is known to label: use the picture book")
        owners: list[Any] = list(self.scenes)
        if fact in SINGLE_FACTS:
            if several := sum(len(scene.things) != 1 for scene in self.scenes):
                raise DataError(
                    f"{several:,} of {len(self):,} pictures do not show exactly one thing, so {fact!r} is not one "
                    'label: load tier="easy", or take a subset'
                )
            owners = [scene.things[0] for scene in self.scenes]
        number = {word: i for i, word in enumerate(names)}
        return torch.tensor([number[getattr(owner, fact)] for owner in owners]), tuple(names)


def to_tensors(dataset: datasets.Dataset, *, image_size: int | None = None) -> PairTensors:
    """Decode every picture once: a `Dataset` with `image` and `captions` -> PairTensors.

    `image_size` is the side in pixels; without it the first picture's is taken. Raises DataError if a column is
    missing, a picture cannot be decoded, or there are no rows.
    """
    if missing := {"image", "captions"} - set(dataset.column_names):
        raise DataError(f"the data set has no column {' or '.join(sorted(missing))}: load it with load_pairs")
    if not len(dataset):
        raise DataError("the data set has no rows: load at least one picture")
    columns = [name for name in ("image", "captions", "scene") if name in dataset.column_names]
    arrow = dataset.select_columns(columns).with_format("arrow")  # the stored bytes; a row at a time is far slower
    images: np.ndarray | None = None
    captions: list[list[str]] = []
    scenes: list[Scene] | None = [] if "scene" in columns else None
    for start in range(0, len(dataset), 1000):
        table = arrow[start : start + 1000]
        for i, picture in enumerate(table.column("image").to_pylist(), start):
            try:
                pixels = _open(picture)
            except _Unusable as fault:
                raise DataError(f"the picture of row {i} cannot be used ({fault}): leave the row out") from fault
            if images is None:
                side = image_size or min(pixels.size)
                images = np.empty((len(dataset), 3, side, side), dtype=np.uint8)
            images[i] = np.asarray(_square(pixels, side)).transpose(2, 0, 1)
        captions += table.column("captions").to_pylist()
        if scenes is not None:
            scenes += map(Scene.from_json, table.column("scene").to_pylist())
    return PairTensors(images=torch.from_numpy(images), captions=captions, scenes=scenes)


def load_picture(path: str | os.PathLike[str], *, image_size: int = 64) -> Tensor:
    """A picture file of your own as the models want it: uint8 (3, S, S), its largest centred square, S = `image_size`.

    Raises DataError if the file is missing, is no picture, or is too large.
    """
    try:
        pixels = _open(os.fspath(path), at_least=image_size)
    except _Unusable as fault:
        raise DataError(f"{os.fspath(path)} is {fault}: give the path of a JPEG or PNG file") from fault
    return torch.from_numpy(np.asarray(_square(pixels, image_size)).transpose(2, 0, 1).copy())


class Batches:
    """Training batches by their number: `batches(step)` is always the same one, so a run can resume at any step.

    Each epoch is a fresh permutation from `(seed, epoch)`; its ragged last part is dropped.
    """

    def __init__(self, tensors: tuple[Tensor, ...], *, batch_size: int, seed: int = 0) -> None:
        """`tensors` share their first dimension N. Raises DataError if they do not, or if N < batch_size."""
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise DataError(f"the tensors must have one length in common, but have {sorted(sizes)}")
        (self.size,) = sizes
        if not 1 <= batch_size <= self.size:
            raise DataError(f"batch_size={batch_size} does not fit {self.size} rows: use 1 to {self.size}")
        self.tensors = tuple(tensors)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = self.size // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> LongTensor:
        """The rows (B,) of training batch `step`, counted from 0; always on the CPU, the same on every device."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch < 0:
            raise DataError(f"step={step} does not exist: steps are counted from 0")
        if epoch != self._epoch:
            # torch's CPU generator reads the low 32 bits of its seed: epochs of neighbouring seeds must not meet there.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """Training batch `step`: the chosen rows (B, ...) of every tensor."""
        rows = self.indices(step)
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)

    def to(self, device: torch.device | str) -> Batches:
        """The same batches with their tensors on `device`."""
        return Batches(tuple(t.to(device) for t in self.tensors), batch_size=self.batch_size, seed=self.seed)


class CaptionBatches:
    """Training batches of pictures with their captions: `batches(step)` is always the same one, so a run can resume.

    `table` (a `TokenTable`) holds the captions' ids; both are in the same order as `images` (N, C, H, W).
    """

    def __init__(
        self, images: Tensor, table: TokenTable, *, batch_size: int, seed: int = 0, caption: int | None = None
    ) -> None:
        """`caption` is which of a picture's captions to take (-1: the last); None draws one anew each time."""
        if len(images) != len(table):
            raise DataError(f"there are {len(images)} pictures and captions of {len(table)}: give the same ones")
        self.images, self.table, self.caption, self.seed = images, table, caption, seed
        self.order = Batches((torch.arange(len(images)),), batch_size=batch_size, seed=seed)

    def generator(self, step: int) -> torch.Generator:
        """A random generator for everything that is drawn for batch `step`."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32 ^ 0x5EED)

    def texts(self, step: int, generator: torch.Generator) -> tuple[LongTensor, LongTensor, Tensor]:
        """The rows (B,) of batch `step`, ids (B, L) and mask (B, L) of one caption each."""
        rows = self.order.indices(step)
        caption = self.caption
        if caption is None:
            caption = torch.randint(1 << 30, rows.shape, generator=generator)
        return rows, *self.table(rows, caption)

    def __call__(self, step: int) -> tuple[Tensor, LongTensor, Tensor]:
        """Training batch `step`: images (B, C, H, W), ids (B, L), mask (B, L)."""
        rows, ids, mask = self.texts(step, self.generator(step))
        return self.images[rows], ids, mask


# ---- sources ----


def _picturebook(
    split: str, *, tier: str, seed: int, n: int | None, image_size: int, cache: Path, progress: bool
) -> datasets.Dataset:
    from minivlp.data.picturebook.sample import sample

    try:
        sample(0, split=split, tier=tier, seed=seed)
    except ValueError as error:  # its message says which splits and tiers there are
        raise DataError(str(error)) from error
    count = n or DEFAULT_SIZES.get(split, OTHER_SIZE)
    stem = f"picturebook-{split}-{tier}-{image_size}px-seed{seed}-{_picturebook_version()}"

    # Pictures do not depend on how many are drawn, so the first rows of a longer file are the same.
    lengths = (path.stem.rpartition("-")[2] for path in cache.glob(f"{stem}-*.parquet"))
    longer = {length for length in map(int, filter(str.isdigit, lengths)) if length >= count}
    for length in sorted(longer):
        table = _read_cache(cache / f"{stem}-{length}.parquet", rows=length)
        if table is not None:
            return _dataset(table.slice(0, count), _features(picturebook=True), identity=f"{stem}-{count}")
    table = _draw_book(split, tier=tier, seed=seed, count=count, image_size=image_size, progress=progress)
    _write_cache(table, cache / f"{stem}-{count}.parquet")
    return _dataset(table, _features(picturebook=True), identity=f"{stem}-{count}")


def _draw_book(split: str, *, tier: str, seed: int, count: int, image_size: int, progress: bool) -> pa.Table:
    from tqdm import tqdm

    from minivlp.data.picturebook.describe import captions
    from minivlp.data.picturebook.draw import draw_many
    from minivlp.data.picturebook.questions import questions
    from minivlp.data.picturebook.sample import sample
    from minivlp.data.picturebook.web import web_caption

    # One more than is drawn: a "swapped" web caption describes the next picture.
    scenes = [sample(index, split=split, tier=tier, seed=seed) for index in range(count + 1)]
    pictures = draw_many(scenes[:-1], size=image_size, progress=progress)
    columns: dict[str, list[Any]] = {name: [] for name in _features(picturebook=True)}
    pairs = tqdm(
        itertools.pairwise(scenes), total=count, desc="describing", unit=" pictures", leave=False, disable=not progress
    )
    for png, (scene, following) in zip(pictures, pairs, strict=True):
        columns["image"].append({"bytes": png, "path": None})
        columns["captions"].append(captions(scene))
        columns["scene"].append(scene.to_json())
        text, noise = web_caption(scene, following)
        columns["web_caption"].append(text)
        columns["web_noise"].append(noise)
        columns["questions"].append(
            [{"question": item.question, "answer": item.answer, "type": item.type} for item in questions(scene)]
        )
    return _table(columns, _features(picturebook=True))


def _picturebook_version() -> str:
    """A fingerprint of the code that makes the picture book, so that a changed drawing is never served stale."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    for path in sorted((Path(__file__).parent / "picturebook").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def _flickr8k(split: str, *, n: int | None, image_size: int, cache: Path, progress: bool) -> datasets.Dataset:
    split = SPLIT_NAMES.get(split, split)
    if split not in ("train", "val", "test"):
        raise DataError(f"flickr8k has no split {split!r}: choose from train, val, test")
    stem = f"flickr8k-{split}-{image_size}px-format{CACHE_FORMAT}"
    path = cache / f"{stem}.parquet"
    table = _read_cache(path)
    if table is None:  # always the whole split: it comes from the Hub in one piece
        tables, columns, total = _flickr8k_from_hub(split)
        rows = _table_rows(tables, columns)
        table = _clean(rows, source="flickr8k", n=None, total=total, image_size=image_size, progress=progress)
        _write_cache(table, path)
    return _dataset(table.slice(0, n), _features(), identity=f"{stem}-{n}")


def _flickr8k_from_hub(split: str) -> tuple[Iterator[pa.Table], list[str], int]:
    import datasets

    try:
        photos = datasets.load_dataset(FLICKR8K, split={"val": "validation"}.get(split, split))
    except Exception as error:  # no network, offline mode, a proxy, a full disk: each library has its own class
        raise DataError(
            f"Flickr8k could not be fetched from the Hugging Face Hub ({FLICKR8K}): connect this machine to the "
            "internet, or download its parquet files on another one and give their folder, load_pairs(folder)"
        ) from error
    columns = _columns(photos.features.arrow_schema, "flickr8k")
    tables = photos.select_columns(columns).with_format("arrow").iter(batch_size=100)
    return tables, columns, len(photos)


def _local(path: Path, split: str, *, n: int | None, image_size: int, progress: bool) -> datasets.Dataset:
    import pyarrow
    import pyarrow.parquet as pq

    source = path.name or str(path)
    try:
        files = _local_files(path, split)
        if files[0].suffix == ".jsonl":
            listed = _metadata_rows(files[0])
            rows, total = iter(listed), len(listed)
        else:
            parquets = [pq.ParquetFile(file) for file in files]
            columns = _columns(parquets[0].schema_arrow, source)
            batches = (batch for file in parquets for batch in file.iter_batches(batch_size=100, columns=columns))
            rows = _table_rows(batches, columns, folder=files[0].parent)
            total = sum(file.metadata.num_rows for file in parquets)
        table = _clean(rows, source=source, n=n, total=total, image_size=image_size, progress=progress)
    except DataError:
        raise
    except (OSError, UnicodeDecodeError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{source} cannot be read ({error}): is it complete, and may you read it?") from error
    return _dataset(table, _features())


def _local_files(path: Path, split: str) -> list[Path]:
    """The parquet files, or the one metadata.jsonl, that hold `split`."""
    if path.is_file() and (path.suffix == ".parquet" or path.name == "metadata.jsonl"):
        sets = {"train": [path]}
    elif path.is_dir():
        sets = _splits_of(path)
    else:
        raise DataError(f"there is no source {str(path)!r}: give {ACCEPTED}")
    if not sets:
        raise DataError(f"the folder {path.name} has neither a metadata.jsonl nor parquet files: give {ACCEPTED}")
    wanted = SPLIT_NAMES.get(split, split)
    if wanted not in sets:
        raise DataError(f"{path.name} has no split {split!r}: it has {', '.join(sets)}")
    return sets[wanted]


def _splits_of(folder: Path) -> dict[str, list[Path]]:
    """Every split a folder holds -> its parquet files or its metadata.jsonl. Data without a split's name is "train"."""
    sets: dict[str, list[Path]] = {}
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        files = _files_of(child)
        if child.name == "data":  # the Hub's usual place for parquet files
            sets.update(_by_prefix(files))
        elif files:
            sets[SPLIT_NAMES.get(child.name, child.name)] = files
    return sets | _by_prefix(_files_of(folder))


def _files_of(folder: Path) -> list[Path]:
    metadata = folder / "metadata.jsonl"
    return [metadata] if metadata.is_file() else sorted(folder.glob("*.parquet"))


def _by_prefix(files: list[Path]) -> dict[str, list[Path]]:
    """Files sorted by the split in their names, `validation-00000-of-00001.parquet`; without any, all are "train"."""
    sets: dict[str, list[Path]] = {}
    for file in files:
        sets.setdefault(SPLIT_NAMES.get(file.stem.split("-")[0].lower(), "train"), []).append(file)
    return sets


def _columns(schema: pa.Schema, source: str) -> list[str]:
    """The picture's column and those of the captions. Raises DataError if one is missing or of a wrong type."""
    import pyarrow.types as types

    captions = _caption_keys(schema.names)
    if "image" not in schema.names or not captions:
        raise DataError(
            f"{source} has the columns {', '.join(schema.names)}: rename them to image and captions "
            "(or caption, text, caption_0, caption_1...)"
        )
    image = schema.field("image").type
    if types.is_struct(image):
        fits = image.get_field_index("bytes") >= 0
    else:
        fits = types.is_binary(image) or types.is_large_binary(image) or types.is_string(image)
    if not fits:
        raise DataError(f"column image of {source} holds {image}: it needs the bytes of picture files")
    for name in captions:
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise DataError(f"column {name} of {source} holds {kind}: it needs text or lists of text")
    return ["image", *captions]


def _caption_keys(names: Iterable[str]) -> list[str]:
    names = list(names)
    for name in ("captions", "caption", "text"):
        if name in names:
            return [name]
    numbered = [name for name in names if name.startswith("caption_") and name[8:].isdigit()]
    return sorted(numbered, key=lambda name: int(name[8:]))


def _table_rows(tables: Iterable[Any], columns: list[str], *, folder: Path | None = None) -> Iterator[Row]:
    """The rows of arrow tables or batches. A stored path without bytes is looked up in `folder`."""
    number = 0
    _, *words = columns
    for table in tables:
        for row in table.to_pylist():
            picture = row["image"]
            if isinstance(picture, dict):
                picture = picture["bytes"] or picture.get("path")
            if isinstance(picture, str):
                picture = (folder or Path()) / picture
            yield f"row {number}", picture, row[words[0]] if len(words) == 1 else [row[word] for word in words]
            number += 1


def _metadata_rows(metadata: Path) -> list[Row]:
    """The rows of a metadata.jsonl: file names relative to its folder, and captions."""
    rows: list[Row] = []
    keys: set[str] = set()
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            rows.append((f"line {number}", _Unusable("a line that is not a JSON object"), None))
            continue
        keys |= entry.keys()
        name = entry.get("file_name")
        picture = metadata.parent / name if isinstance(name, str) and name else _Unusable("no file_name")
        words = _caption_keys(entry)
        captions = entry[words[0]] if len(words) == 1 else [entry[word] for word in words]
        rows.append((str(name or f"line {number}"), picture, captions))
    if rows and ("file_name" not in keys or not _caption_keys(keys)):
        raise DataError(
            f"{metadata.name} has the keys {', '.join(sorted(keys)) or 'none'}: every line needs file_name and "
            "captions (or caption, text)"
        )
    return rows


# ---- cleaning ----


class _Unusable(Exception):
    """A row cannot be used; the message is a noun for the report, such as "an unreadable picture"."""


@dataclass
class _Report:
    """Counts what was wrong, and names the first three rows of each kind."""

    source: str
    seen: int = 0
    rows: dict[str, list[str]] = field(default_factory=dict)  # reason -> rows left out
    captions: list[str] = field(default_factory=list)  # rows kept with fewer captions, once per caption

    def sentence(self) -> str:
        parts = []
        if lost := sum(map(len, self.rows.values())):
            reasons = "; ".join(f"{len(names):,} with {reason}: {_few(names)}" for reason, names in self.rows.items())
            parts.append(f"{lost:,} of {self.seen:,} rows were left out ({reasons})")
        if self.captions:
            parts.append(f"{len(self.captions):,} empty captions of kept rows were dropped ({_few(self.captions)})")
        return f"{self.source}: {' and '.join(parts)}"


def _few(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _clean(rows: Iterable[Row], *, source: str, n: int | None, total: int, image_size: int, progress: bool) -> pa.Table:
    """The first `n` good rows as a table of square RGB pictures (PNG) and captions; the bad ones in one warning."""
    from tqdm import tqdm

    report = _Report(source)
    pictures: list[dict[str, Any]] = []
    captions: list[list[str]] = []
    wanted = min(total, n or total)
    with tqdm(total=wanted, desc=f"reading {source}", unit=" pictures", leave=False, disable=not progress) as bar:
        for name, picture, texts in rows:
            report.seen += 1
            try:
                image = _square(_open(picture, at_least=image_size), image_size)
                good, dropped = _clean_captions(texts)
            except _Unusable as fault:
                report.rows.setdefault(str(fault), []).append(name)
                continue
            report.captions += [name] * dropped
            stream = io.BytesIO()
            image.save(stream, format="PNG", compress_level=3)
            pictures.append({"bytes": stream.getvalue(), "path": None})
            captions.append(good)
            bar.update()
            if len(pictures) == wanted:
                break
    if not pictures:
        raise DataError(report.sentence() + ", so nothing is left" if report.rows else f"{source} has no rows")
    if report.rows or report.captions:
        warnings.warn(report.sentence(), DataWarning, stacklevel=4)
    return _table({"image": pictures, "captions": captions}, _features())


def _clean_captions(texts: Any) -> tuple[list[str], int]:
    """The usable captions with single spaces, and how many were empty. Raises _Unusable if none is usable."""
    texts = texts if isinstance(texts, list) else [texts]
    good = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if not good:
        raise _Unusable("no caption")
    return good, len(texts) - len(good)


def _open(picture: Any, *, at_least: int | None = None) -> Image.Image:
    """A picture from bytes, a path or `{"bytes", "path"}`, upright and RGB. Raises _Unusable with the reason.

    `at_least` lets the JPEG decoder stop at a smaller size whose sides are still at least twice that.
    """
    if isinstance(picture, _Unusable):
        raise picture
    if isinstance(picture, dict):
        picture = picture["bytes"] or picture.get("path")
    if not picture:
        raise _Unusable("no picture")
    too_large = _Unusable(f"a picture over {MAX_PIXELS // 1_000_000} million pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is reported below
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                if not all(image.size):
                    raise _Unusable("a picture without pixels")
                if image.width * image.height > MAX_PIXELS:
                    raise too_large
                if at_least:
                    image.draft(None, (2 * at_least, 2 * at_least))
                return _rgb(ImageOps.exif_transpose(image))
    except _Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise too_large from error
    except FileNotFoundError as error:
        raise _Unusable("a missing picture") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files; each means the same here
        raise _Unusable("an unreadable picture") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: transparency on white, 16-bit and float pixels brought to 0..255."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float32)
        largest = next(top for top in (1.0, 255.0, 65535.0, np.inf) if pixels.max() <= top)
        if image.mode.startswith("I;16"):
            largest = 65535.0
        image = Image.fromarray((pixels / largest * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square, resized to `side` x `side`."""
    if image.size == (side, side):
        return image
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    box = (left, top, left + edge, top + edge)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


# ---- tables and cache ----


def _features(*, picturebook: bool = False) -> datasets.Features:
    from datasets import Features, Image, Value

    text = Value("string")
    columns: dict[str, Any] = {"image": Image(), "captions": [text]}
    if picturebook:
        columns |= {"scene": text, "web_caption": text, "web_noise": text}
        columns["questions"] = [{"question": text, "answer": text, "type": text}]
    return Features(columns)


def _table(columns: dict[str, list[Any]], features: datasets.Features) -> pa.Table:
    import pyarrow

    return pyarrow.table(columns, schema=features.arrow_schema)


def _dataset(table: pa.Table, features: datasets.Features, *, identity: str | None = None) -> datasets.Dataset:
    """`identity` names the content, which spares `datasets` from hashing all of it."""
    import datasets

    fingerprint = identity and hashlib.sha256(identity.encode()).hexdigest()[:16]
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir or os.environ.get("MINIVLP_CACHE") or Path.home() / ".cache" / "minivlp").expanduser()


def _read_cache(path: Path, *, rows: int | None = None) -> pa.Table | None:
    """The cached table, or None where there is none; a damaged file is reported and counts as none."""
    import pyarrow
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        # Read into memory and closed, so that another process can replace the file; the checksums notice flipped bits.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pyarrow.ArrowException):
        table = None
    if table is None or not table.num_rows or rows not in (None, table.num_rows):
        warnings.warn(f"the cached file {path.name} is damaged and is made again", DataWarning, stacklevel=4)
        return None
    return table


def _write_cache(table: pa.Table, path: Path) -> None:
    """Write beside the target and rename: other processes see the whole file or none, and two writers do no harm."""
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(".*.tmp"):  # left by a process that was killed
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink(missing_ok=True)
        pq.write_table(table, temporary, row_group_size=1000, write_page_checksum=True)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"the pictures cannot be cached in {path.parent} ({error.strerror or error}), so they stay in memory and "
            "are made again next time: set MINIVLP_CACHE to a folder that can be written to",
            DataWarning,
            stacklevel=4,
        )
    finally:
        if temporary.exists():
            temporary.unlink()
