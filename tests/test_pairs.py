"""The one door to every data set, what it does with bad rows and damaged caches, and the training batches."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from minivlp.data import (
    Batches,
    CaptionBatches,
    DataError,
    DataWarning,
    PairTensors,
    Tokenizer,
    TokenTable,
    load_pairs,
    load_picture,
    pairs,
    to_tensors,
)
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, Scene, Thing

REPOSITORY = Path(__file__).resolve().parents[1]
FLICKR8K = REPOSITORY.parent / "shared" / "data" / "flickr8k"


def png(colour=(200, 30, 40), size=(8, 8), mode="RGB", form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, form, **options)
    return stream.getvalue()


def write_parquet(path: Path, images, captions, *, image_type=None, captions_type=None) -> Path:
    image_type = image_type or pa.struct({"bytes": pa.binary(), "path": pa.string()})
    captions_type = captions_type or pa.list_(pa.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": pa.array(images, image_type), "captions": pa.array(captions, captions_type)}), path
    )
    return path


def struct(content: bytes | None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


@pytest.fixture
def good_parquet(tmp_path) -> Path:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    return write_parquet(
        tmp_path / "four.parquet", [struct(png(c)) for c in colours], [[f"caption {i}", "more"] for i in range(4)]
    )


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def pixel(dataset, row=0) -> tuple[int, ...]:
    """The mean colour of a picture."""
    return tuple(np.asarray(dataset[row]["image"]).reshape(-1, 3).mean(0).round().astype(int).tolist())


# ---- sources ----


def test_parquet_file(good_parquet, no_warnings):
    dataset = load_pairs(good_parquet, image_size=16)
    assert dataset.column_names == ["image", "captions"] and len(dataset) == 4
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset[2]["captions"] == ["caption 2", "more"]
    assert dataset[2]["image"].size == (16, 16) and dataset[2]["image"].mode == "RGB"
    assert pixel(dataset, 2) == (0, 0, 250)
    assert load_pairs(str(good_parquet), n=3, progress=False)["captions"][:] == dataset["captions"][:3]
    with pytest.raises(DataError, match="no split 'test': it has train"):
        load_pairs(good_parquet, "test")


@pytest.mark.parametrize("shape", ["caption", "text", "numbered", "raw bytes", "path"])
def test_parquet_schemas(tmp_path, shape, no_warnings):
    (tmp_path / "a.png").write_bytes(png())
    images = {"raw bytes": [png()], "path": ["a.png"]}.get(shape, [struct(png())])
    texts = {"caption": {"caption": ["one"]}, "text": {"text": ["one"]}}.get(shape, {"captions": [["one"]]})
    if shape == "numbered":  # the order is that of the numbers; the Hub's Flickr8k looks like this
        texts = {f"caption_{i}": [str(i)] for i in (10, 0, 2, 1)}
    pq.write_table(pa.table({"image": images, **texts, "other": [1]}), tmp_path / "a.parquet")
    dataset = load_pairs(tmp_path / "a.parquet", progress=False)
    assert dataset[0]["captions"] == (["0", "1", "2", "10"] if shape == "numbered" else ["one"])
    assert pixel(dataset) == (200, 30, 40)


def test_folder_of_parquet_files_with_splits(tmp_path, no_warnings):
    for name, text in (
        ("train-00000-of-00002", "a"),
        ("train-00001-of-00002", "b"),
        ("validation-00000-of-00001", "c"),
    ):
        write_parquet(tmp_path / "photos" / "data" / f"{name}.parquet", [struct(png())], [[text]])
    folder = tmp_path / "photos"
    assert [row["captions"] for row in load_pairs(folder, progress=False)] == [["a"], ["b"]]
    assert load_pairs(folder, "val", progress=False)[0]["captions"] == ["c"]
    assert load_pairs(folder, "validation", progress=False)[0]["captions"] == ["c"]
    with pytest.raises(DataError, match="photos has no split 'test': it has train, val"):
        load_pairs(folder, "test")


def write_imagefolder(folder: Path, entries: list[dict | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_imagefolder(tmp_path, split, no_warnings):
    folder = tmp_path / split if split else tmp_path
    write_imagefolder(
        folder,
        [{"file_name": "a.png", "captions": ["one", "two"]}, "", {"file_name": "sub/b.jpg", "caption": "drei Äpfel"}],
    )
    (folder / "sub").mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "sub" / "b.jpg").write_bytes(png((0, 0, 0), form="JPEG"))
    dataset = load_pairs(tmp_path, split or "train", progress=False)
    assert dataset["captions"][:] == [["one", "two"], ["drei Äpfel"]]
    assert pixel(dataset, 1) == (0, 0, 0)
    assert len(load_pairs(folder / "metadata.jsonl", progress=False)) == 2


def test_flickr8k_from_the_hub_is_decoded_once_and_cached(tmp_path, monkeypatch, no_warnings):
    calls = []

    def hub(name, *, split):
        calls.append((name, split))
        photos = {"image": [struct(png((i, 0, 0), (20, 10), form="PNG")) for i in range(3)]}
        captions = {f"caption_{k}": [f"photo {i} says {k} ." for i in range(3)] for k in range(5)}
        return datasets.Dataset.from_dict(photos | captions).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", hub)
    dataset = load_pairs("flickr8k", "val", cache_dir=tmp_path, progress=False)
    assert calls == [("jxie/flickr8k", "validation")]
    assert dataset[2]["captions"] == [f"photo 2 says {k} ." for k in range(5)]
    assert dataset[2]["image"].size == (64, 64) and pixel(dataset, 2) == (2, 0, 0)

    again = load_pairs("flickr8k", "val", n=2, cache_dir=tmp_path, progress=False)
    assert len(calls) == 1 and again["captions"][:] == dataset["captions"][:2]
    load_pairs("flickr8k", "val", image_size=32, cache_dir=tmp_path, progress=False)
    assert len(calls) == 2  # another size is another file
    with pytest.raises(DataError, match="no split 'heldout_colour'"):
        load_pairs("flickr8k", "heldout_colour", cache_dir=tmp_path)


def test_flickr8k_without_network_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"connect this machine to the internet, or .* load_pairs\(folder\)"):
        load_pairs("flickr8k", cache_dir=tmp_path, progress=False)


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the photos are not here")
def test_real_photos(no_warnings):
    dataset = load_pairs(FLICKR8K, "val", n=200, progress=False)
    tensors = to_tensors(dataset)
    assert tensors.images.shape == (200, 3, 64, 64) and tensors.scenes is None
    assert all(len(texts) == 5 for texts in tensors.captions)
    assert 30 < tensors.images.float().std() < 100  # photos, not blanks
    assert torch.equal(to_tensors(load_pairs(FLICKR8K, "val", n=50, progress=False)).images, tensors.images[:50])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco", r'there is no source .*coco.* give "picturebook", "flickr8k", a folder'),
        ("no/such/file.parquet", "there is no source"),
    ],
)
def test_unknown_source(name, message):
    with pytest.raises(DataError, match=message):
        load_pairs(name)


def test_wrong_options(good_parquet, tmp_path):
    for options, message in (
        ({"n": 0}, "n=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"split": "tests", "cache_dir": tmp_path}, "no split is called 'tests': choose from train"),
        ({"split": "heldout_count", "tier": "easy", "cache_dir": tmp_path}, "no count can be withheld"),
        ({"tier": "medium", "cache_dir": tmp_path}, "no tier is called 'medium': choose from easy, normal, hard"),
    ):
        with pytest.raises(DataError, match=message):
            load_pairs("picturebook", **options)


def test_folder_with_nothing_to_load(tmp_path):
    with pytest.raises(DataError, match=r"neither a metadata\.jsonl nor parquet files"):
        load_pairs(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="there is no source"):
        load_pairs(tmp_path / "notes.txt")


# ---- bad rows ----


def two_png_chunks(content: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    import struct as binary
    import zlib

    header = b"IHDR" + binary.pack(">II", width, height) + content[24:29]
    return content[:12] + header + binary.pack(">I", zlib.crc32(header)) + content[33:]


BAD_PICTURES = {
    "an unreadable picture": b"this is no picture",
    "an unreadable picture (cut)": png(size=(64, 64), form="JPEG")[:200],
    "an unreadable picture (cut png)": png(size=(64, 64))[:60],
    "a picture over 50 million pixels": two_png_chunks(png(), 9000, 9000),
    "a picture over 50 million pixels (bomb)": two_png_chunks(png(), 60_000, 60_000),
    "without pixels": two_png_chunks(png(), 0, 8),
    "no picture": None,
    "no picture (empty)": b"",
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_left_out_and_named(tmp_path, case):
    images = [struct(png()), struct(BAD_PICTURES[case]), struct(png((0, 0, 9)))]
    path = write_parquet(tmp_path / "p.parquet", images, [["a"], ["b"], ["c"]])
    with pytest.warns(DataWarning) as caught:
        dataset = load_pairs(path, progress=False)
    assert dataset["captions"][:] == [["a"], ["c"]]
    assert pixel(dataset, 1) == (0, 0, 9)
    (warning,) = caught
    reason = "picture" if case == "without pixels" else case.split(" (")[0]  # Pillow versions refuse it at two points
    assert str(warning.message).startswith("p.parquet: 1 of 3 rows were left out (1 with ")
    assert reason in str(warning.message) and "row 1" in str(warning.message)


def test_bad_captions_are_left_out_and_named(tmp_path):
    captions = [["good", None], ["", "  \n"], None, ["  two \t words "], []]
    path = write_parquet(tmp_path / "p.parquet", [struct(png())] * 5, captions)
    with pytest.warns(DataWarning) as caught:
        dataset = load_pairs(path, progress=False)
    assert dataset["captions"][:] == [["good"], ["two words"]]
    assert [str(w.message) for w in caught] == [
        "p.parquet: 3 of 5 rows were left out (3 with no caption: row 1, row 2, row 4) and 1 empty captions of kept "
        "rows were dropped (row 0)"
    ]


def test_many_bad_rows_make_one_short_sentence(tmp_path):
    images = [struct(png() if i % 2 else b"bad") for i in range(40)]
    path = write_parquet(tmp_path / "p.parquet", images, [["a"]] * 40)
    with pytest.warns(DataWarning) as caught:
        load_pairs(path, progress=False)
    assert [str(w.message) for w in caught] == [
        "p.parquet: 20 of 40 rows were left out (20 with an unreadable picture: row 0, row 2, row 4, ...)"
    ]


def test_bad_lines_of_an_imagefolder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write_imagefolder(
        tmp_path,
        [
            {"file_name": "a.png", "captions": ["fine"]},
            "{not json",
            {"captions": ["no file"]},
            {"file_name": "gone.png", "captions": ["x"]},
            {"file_name": "a.png", "captions": [3, None]},
            {"file_name": "a.png"},
            "[1, 2]",
        ],
    )
    with pytest.warns(DataWarning) as caught:
        dataset = load_pairs(tmp_path, progress=False)
    assert dataset["captions"][:] == [["fine"]]
    message = str(caught[0].message)
    for part in (
        "6 of 7 rows were left out",
        "2 with a line that is not a JSON object: line 2, line 7",
        "1 with no file_name: line 3",
        "1 with a missing picture: gone.png",
        "2 with no caption: a.png",
    ):
        assert part in message


def test_nothing_left_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [struct(b"bad")], [["a"]])
    with pytest.raises(DataError, match=r"1 of 1 rows were left out .* so nothing is left"):
        load_pairs(path, progress=False)
    with pytest.raises(DataError, match=r"empty\.parquet has no rows"):
        load_pairs(write_parquet(tmp_path / "empty.parquet", [], []), progress=False)
    with pytest.raises(DataError, match="has no rows"):
        load_pairs(write_imagefolder(tmp_path / "folder", []), progress=False)


def test_missing_columns_are_named(tmp_path):
    pq.write_table(pa.table({"photo": [png()], "captions": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns photo, captions: rename them to image and captions"):
        load_pairs(tmp_path / "a.parquet")
    write_imagefolder(tmp_path / "f", [{"file_name": "a.png", "label": 3}])
    with pytest.raises(DataError, match="has the keys file_name, label"):
        load_pairs(tmp_path / "f")


def test_wrong_types_are_named(tmp_path):
    with pytest.raises(DataError, match=r"column image of a\.parquet holds int64"):
        load_pairs(write_parquet(tmp_path / "a.parquet", [1], [["a"]], image_type=pa.int64()))
    path = write_parquet(tmp_path / "b.parquet", [struct(png())], [[1]], captions_type=pa.list_(pa.int64()))
    with pytest.raises(DataError, match=r"column captions of b\.parquet holds int64"):
        load_pairs(path)


def test_unreadable_files(tmp_path, good_parquet):
    (tmp_path / "half.parquet").write_bytes(good_parquet.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"half\.parquet cannot be read"):
        load_pairs(tmp_path / "half.parquet")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="f cannot be read"):
        load_pairs(tmp_path / "f")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, colour, expected, no_warnings):
    form = "TIFF" if mode == "CMYK" else "PNG"
    path = write_parquet(tmp_path / "p.parquet", [struct(png(colour, mode=mode, form=form))], [["a"]])
    got = pixel(load_pairs(path, image_size=8, progress=False))
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1


def test_palette_transparency_becomes_white(tmp_path, no_warnings):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([9, 9, 9, 70, 80, 90])
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=1)
    path = write_parquet(tmp_path / "p.parquet", [struct(stream.getvalue())], [["a"]])
    assert pixel(load_pairs(path, image_size=8, progress=False)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path, no_warnings):
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste((0, 0, 0), (0, 0, 8, 4))  # black above
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to see it upright: black on the right
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    path = write_parquet(tmp_path / "p.parquet", [struct(stream.getvalue())], [["a"]])
    pixels = np.asarray(load_pairs(path, image_size=8, progress=False)[0]["image"])
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (2000, 800)])
def test_pictures_are_cropped_at_the_centre_not_squashed(tmp_path, size, no_warnings):
    picture = Image.new("RGB", size, (255, 0, 0))
    edge = min(size)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    picture.paste((0, 0, 255), (left, top, left + edge, top + edge))
    stream = io.BytesIO()
    picture.save(stream, "JPEG" if edge > 100 else "PNG", quality=95)
    path = write_parquet(tmp_path / "p.parquet", [struct(stream.getvalue())], [["a"]])
    pixels = np.asarray(load_pairs(path, image_size=16, progress=False)[0]["image"]).astype(int)
    assert np.abs(pixels - (0, 0, 255)).max() <= 20  # nothing of the red sides is left


# ---- the picture book ----


def book(cache: Path, **options) -> datasets.Dataset:
    return load_pairs("picturebook", **{"n": 6, "cache_dir": cache, "progress": False, **options})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A cache folder with one small book, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("shelf")
    book(folder)
    return folder


@pytest.fixture
def cache(shelf, tmp_path) -> Path:
    for path in shelf.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_picturebook_columns(shelf, no_warnings):
    dataset = book(shelf)
    assert dataset.column_names == ["image", "captions", "scene", "web_caption", "web_noise", "questions"]
    row = dataset[0]
    scene = Scene.from_json(row["scene"])
    assert (scene.split, scene.tier, scene.index, scene.seed) == ("train", "normal", 0, 0)
    assert row["image"].size == (64, 64) and len(row["captions"]) == 5
    assert set(row["questions"][0]) == {"question", "answer", "type"}
    assert row["web_caption"] and row["web_noise"]


def test_picturebook_is_the_same_whether_drawn_or_cached(shelf, tmp_path, no_warnings):
    drawn, cached = book(tmp_path), book(shelf)
    assert drawn.data.equals(cached.data)
    assert drawn._fingerprint == cached._fingerprint
    assert not drawn.data.equals(book(tmp_path, seed=1).data)


def test_a_longer_cached_book_serves_a_shorter_request(cache, no_warnings):
    before = files(cache)
    shorter = book(cache, n=3)
    assert files(cache) == before and len(shorter) == 3
    drawn = book(cache / "empty", n=3)
    assert shorter["scene"][:] == drawn["scene"][:] and shorter["web_caption"][:] == drawn["web_caption"][:]


def test_every_option_that_changes_pictures_is_in_the_file_name(cache, monkeypatch, no_warnings):
    for options in ({"split": "test"}, {"tier": "easy"}, {"image_size": 32}, {"seed": 3}, {"n": 7}):
        count = len(files(cache))
        book(cache, **options)
        assert len(files(cache)) == count + 1, options
    monkeypatch.setattr(pairs, "_picturebook_version", lambda: "after a change of the drawing")
    count = len(files(cache))
    book(cache)
    assert len(files(cache)) == count + 1


def test_the_version_follows_the_source_of_the_drawing(tmp_path, monkeypatch):
    package = tmp_path / "picturebook"
    package.mkdir()
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "pairs.py"))
    (package / "draw.py").write_bytes(b"a = 1\n")
    first = pairs._picturebook_version()
    (package / "draw.py").write_bytes(b"a = 1\r\n")  # a checkout on Windows
    assert pairs._picturebook_version() == first
    (package / "draw.py").write_bytes(b"a = 2\n")
    assert pairs._picturebook_version() != first


def damage_cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_flip(content: bytes) -> bytes:
    """One changed byte inside the pictures; the file's own structure stays intact."""
    place = content.index(b"IDAT") + 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def damage_empty(content: bytes) -> bytes:
    return b""


def damage_rows(content: bytes) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(content)).slice(0, 4), stream)
    return stream.getvalue()


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_empty, damage_rows])
def test_a_damaged_cache_is_noticed_and_rebuilt(cache, damage):
    (path,) = cache.glob("*.parquet")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.warns(DataWarning, match="is damaged and is made again") as caught:
        rebuilt = book(cache)
    assert len(caught) == 1
    assert len(rebuilt) == 6 and to_tensors(rebuilt).images.shape == (6, 3, 64, 64)
    assert path.read_bytes() == good and files(cache) == [path.name]


def test_a_damaged_longer_book_does_not_stop_a_shorter_request(cache):
    (path,) = cache.glob("*.parquet")
    path.write_bytes(b"")
    with pytest.warns(DataWarning, match="damaged"):
        assert len(book(cache, n=2)) == 2


def build_at_once(folder: str, barrier, results) -> None:
    barrier.wait()
    results.put(to_tensors(book(Path(folder), n=40)).images.sum().item())


def test_two_processes_building_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=build_at_once, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1 and sums == {to_tensors(book(tmp_path, n=40)).images.sum().item()}
    assert len(files(tmp_path)) == 1  # no temporary file is left


def test_old_temporary_files_are_cleared_and_new_ones_left_alone(tmp_path):
    old, new = tmp_path / ".x.1.a.tmp", tmp_path / ".x.2.b.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    book(tmp_path)
    assert not old.exists() and new.exists()


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(DataWarning, match="cannot be cached in .* set MINIVLP_CACHE") as caught:
        assert len(book(tmp_path / "file" / "cache")) == 6
    assert len(caught) == 1


def test_cache_folder_from_the_environment(tmp_path, monkeypatch, no_warnings):
    monkeypatch.setenv("MINIVLP_CACHE", str(tmp_path / "elsewhere"))
    load_pairs("picturebook", "val", n=2, progress=False)
    assert len(files(tmp_path / "elsewhere")) == 1


def test_preview_in_the_repository_is_what_the_code_makes(no_warnings):
    """If this fails after a change of the picture book: python -m minivlp.data.preview"""
    from minivlp.data.picturebook.describe import captions
    from minivlp.data.picturebook.draw import draw
    from minivlp.data.preview import preview_scenes

    dataset = load_pairs(REPOSITORY / "data" / "preview", progress=False)
    scenes = preview_scenes()
    assert len(dataset) == len(scenes) == 48
    assert dataset["captions"][:] == [captions(scene) for scene in scenes]
    stored = to_tensors(dataset).images.float()
    drawn = torch.stack([torch.from_numpy(np.array(draw(scene))) for scene in scenes]).permute(0, 3, 1, 2).float()
    assert (stored - drawn).abs().mean(dim=(1, 2, 3)).max() < 2  # of 255; Pillow versions differ in single pixels
    assert (drawn - drawn.roll(1, 0)).abs().mean() > 20  # and that is much less than two pictures differ


def test_preview_can_be_made_anywhere(tmp_path, monkeypatch, capsys):
    from minivlp.data import preview

    monkeypatch.setattr(preview, "DEFAULT_FILE", tmp_path / "data" / "tokenizer.json")
    preview.main()
    assert files(tmp_path / "data") == ["contact_sheet.png", "preview", "tokenizer.json"]
    assert len(load_pairs(tmp_path / "data" / "preview", progress=False)) == 48
    assert (tmp_path / "data" / "contact_sheet.png").stat().st_size < 300_000
    metadata = (tmp_path / "data" / "preview" / "metadata.jsonl").read_bytes()
    assert metadata == (REPOSITORY / "data" / "preview" / "metadata.jsonl").read_bytes()


# ---- tensors and batches ----


def one_thing(i: int, *, things: int = 1) -> Scene:
    thing = Thing(kind=KINDS[i % 12], colour=tuple(COLOURS)[i % 10], size="big", x=32.0, y=32.0, side=38.0)
    return Scene(
        seed=0, index=i, split="train", tier="easy", place=PLACES[i % 6], sky="day", weather="clear",
        things=(thing,) * things,
    )  # fmt: skip


def made_up(count: int = 10) -> PairTensors:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return PairTensors(images, [[f"caption {i}"] for i in range(count)], [one_thing(i) for i in range(count)])


def test_to_tensors_decodes_what_the_dataset_shows(shelf):
    dataset = book(shelf)
    tensors = to_tensors(dataset)
    assert len(tensors) == 6 and tensors.images.dtype == torch.uint8 and tensors.images.is_contiguous()
    for i, row in enumerate(dataset):
        assert np.array_equal(tensors.images[i].permute(1, 2, 0).numpy(), np.asarray(row["image"]))
        assert tensors.captions[i] == row["captions"] and tensors.scenes[i].to_json() == row["scene"]
    shuffled = to_tensors(dataset.select([4, 1]))
    assert torch.equal(shuffled.images, tensors.images[[4, 1]])
    assert to_tensors(dataset, image_size=32).images.shape == (6, 3, 32, 32)


def test_to_tensors_refuses_what_it_cannot_decode(good_parquet):
    dataset = load_pairs(good_parquet, progress=False)
    with pytest.raises(DataError, match="no column image"):
        to_tensors(dataset.remove_columns("image"))
    with pytest.raises(DataError, match="no rows"):
        to_tensors(dataset.select([]))
    broken = datasets.Dataset.from_dict({"image": [struct(png()), struct(b"bad")], "captions": [["a"], ["b"]]})
    with pytest.raises(DataError, match="picture of row 1 cannot be used"):
        to_tensors(broken.cast_column("image", datasets.Image()))


def test_subset():
    data = made_up()
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[3, 7]] = True
    for chosen, expected in (
        ([7, 3], [7, 3]),
        (torch.tensor([7, 3]), [7, 3]),
        (mask, [3, 7]),
        (slice(3, 8, 4), [3, 7]),
    ):
        part = data.subset(chosen)
        assert part.images[:, 0, 0, 0].tolist() == expected
        assert part.captions == [[f"caption {i}"] for i in expected]
        assert [scene.index for scene in part.scenes] == expected
    assert len(data.subset([])) == 0
    assert PairTensors(data.images, data.captions).subset([1]).scenes is None


def test_labels():
    data = made_up()
    labels, names = data.labels("kind")
    assert names == KINDS and labels.tolist() == list(range(10)) and labels.dtype == torch.long
    assert data.labels("colour")[1] == tuple(COLOURS)
    assert [data.labels("place")[1][i] for i in data.labels("place")[0]] == [scene.place for scene in data.scenes]
    assert data.labels("weather")[0].tolist() == data.labels("sky")[0].tolist() == [0] * 10
    assert data.labels("size")[0].tolist() == [1] * 10


def test_labels_that_do_not_exist():
    data = made_up(3)
    with pytest.raises(DataError, match="no labels for 'shape': choose from kind, colour, size, place, sky, weather"):
        data.labels("shape")
    with pytest.raises(DataError, match="without scenes"):
        PairTensors(data.images, data.captions).labels("kind")
    data.scenes[1] = one_thing(1, things=2)
    with pytest.raises(DataError, match="1 of 3 pictures do not show exactly one thing"):
        data.labels("kind")
    assert data.labels("place")[0].tolist() == [0, 1, 2]  # a fact of the whole picture stays one label


def test_batches_cover_each_epoch_once_and_can_be_asked_in_any_order():
    rows = torch.arange(10)
    batches = Batches((rows, rows * 2), batch_size=3, seed=5)
    assert batches.steps_per_epoch == 3
    steps = [batches(step) for step in range(9)]
    for a, b in steps:
        assert a.shape == (3,) and torch.equal(b, a * 2)
    for epoch in range(3):
        seen = torch.cat([a for a, _ in steps[3 * epoch : 3 * epoch + 3]]).tolist()
        assert len(set(seen)) == 9  # the ragged last row is dropped
    resumed = Batches((rows, rows * 2), batch_size=3, seed=5)
    for step in (8, 0, 4, 4):
        assert torch.equal(resumed(step)[0], steps[step][0])
        assert torch.equal(resumed.indices(step), steps[step][0])


def test_epochs_and_seeds_have_different_orders():
    rows = torch.arange(64)
    orders = {
        tuple(Batches((rows,), batch_size=64, seed=seed)(epoch)[0].tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_batches_refuse_what_does_not_fit():
    rows = torch.arange(4)
    with pytest.raises(DataError, match="batch_size=5 does not fit 4 rows"):
        Batches((rows,), batch_size=5)
    with pytest.raises(DataError, match="batch_size=0"):
        Batches((rows,), batch_size=0)
    with pytest.raises(DataError, match="one length in common"):
        Batches((rows, rows[:3]), batch_size=2)
    with pytest.raises(DataError, match="step=-1"):
        Batches((rows,), batch_size=2)(-1)


def test_batches_move_to_a_device_and_stay_the_same():
    rows = torch.arange(6)
    batches = Batches((rows,), batch_size=2, seed=3)
    moved = batches.to("meta")
    assert moved.tensors[0].device.type == "meta" and torch.equal(moved.indices(4), batches.indices(4))
    assert torch.equal(batches.to("cpu")(1)[0], batches(1)[0])


def captioned(count: int = 10) -> tuple[torch.Tensor, TokenTable, Tokenizer]:
    """Pictures whose pixels say which they are, with one, two or three captions that say so too."""
    captions = [[f"picture {i} caption {j}" + " long" * j for j in range(1 + i % 3)] for i in range(count)]
    tokenizer = Tokenizer.train([text for texts in captions for text in texts], vocab_size=140)
    return made_up(count).images, TokenTable(captions, tokenizer), tokenizer


def test_caption_batches_show_each_picture_with_a_caption_of_its_own():
    images, table, tokenizer = captioned()
    batches = CaptionBatches(images, table, batch_size=3, seed=5)
    seen = {i: set() for i in range(10)}
    for step in range(60):
        pictures, ids, mask = batches(step)
        assert pictures.shape == (3, 3, 4, 4) and pictures.dtype == torch.uint8 and ids.shape == mask.shape
        assert mask.dtype == torch.bool and mask[:, 0].all() and mask[:, -1].any()  # no longer than the longest
        rows = pictures[:, 0, 0, 0].tolist()
        assert rows == Batches((images,), batch_size=3, seed=5).indices(step).tolist()
        for row, sentence, present in zip(rows, ids, mask, strict=True):
            words = tokenizer.decode(sentence[present]).split()
            assert words[:3] == ["picture", str(row), "caption"]
            assert words[4:] == ["long"] * int(words[3])
            assert (sentence[~present] == tokenizer.pad_id).all()
            seen[row].add(int(words[3]))
    assert seen == {i: set(range(1 + i % 3)) for i in range(10)}  # in the course of time all of them


@pytest.mark.parametrize("caption", [None, 0, 1, -1])
def test_caption_batches_are_a_function_of_the_step(caption):
    images, table, _ = captioned()
    steps = [CaptionBatches(images, table, batch_size=3, seed=5, caption=caption)(step) for step in range(8)]
    torch.rand(3)  # no other random number has a say
    resumed = CaptionBatches(images, table, batch_size=3, seed=5, caption=caption)
    for step in (7, 0, 4, 4):
        for a, b in zip(resumed(step), steps[step], strict=True):
            assert torch.equal(a, b)
    other = CaptionBatches(images, table, batch_size=3, seed=6, caption=caption)
    assert any(not torch.equal(other(step)[0], steps[step][0]) for step in range(8))
    assert resumed.texts(2, resumed.generator(2))[1].equal(resumed(2)[1])


def test_each_step_draws_captions_of_its_own():
    """With all pictures in each batch only the captions (and the order) can differ from step to step."""
    images, table, tokenizer = captioned(9)
    batches = CaptionBatches(images, table, batch_size=9, seed=0)

    def choice(step: int) -> tuple[int, ...]:
        rows, ids, _ = batches.texts(step, batches.generator(step))
        words = {row: tokenizer.decode(sentence).split() for row, sentence in zip(rows.tolist(), ids, strict=True)}
        return tuple(int(words[row][3]) for row in range(9))

    choices = [choice(step) for step in range(40)]
    assert len(set(choices)) > 30  # of 216
    assert batches.generator(3).initial_seed() != batches.generator(4).initial_seed()
    of_another_seed = CaptionBatches(images, table, batch_size=9, seed=1)
    assert batches.generator(3).initial_seed() != of_another_seed.generator(3).initial_seed()


@pytest.mark.parametrize("caption", [0, 1, -1])
def test_caption_batches_with_a_fixed_caption(caption):
    images, table, _ = captioned()
    batches = CaptionBatches(images, table, batch_size=4, caption=caption)
    for step in range(4):
        pictures, ids, mask = batches(step)
        expected = table(pictures[:, 0, 0, 0].long(), caption)
        assert torch.equal(ids, expected[0]) and torch.equal(mask, expected[1])


def test_caption_batches_refuse_what_does_not_fit():
    images, table, _ = captioned()
    with pytest.raises(DataError, match="there are 9 pictures and captions of 10: give the same ones"):
        CaptionBatches(images[:9], table, batch_size=3)
    with pytest.raises(DataError, match="batch_size=11 does not fit 10 rows"):
        CaptionBatches(images, table, batch_size=11)
    with pytest.raises(DataError, match="step=-1"):
        CaptionBatches(images, table, batch_size=3)(-1)


def test_importing_the_package_does_not_import_datasets():
    import subprocess
    import sys

    code = "import sys, minivlp.data; sys.exit('datasets' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---- one picture of one's own ----


def test_load_picture_gives_the_middle_square(tmp_path):
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = (200, 100, 50)  # exactly the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture = load_picture(tmp_path / "wide.png", image_size=40)
    assert picture.shape == (3, 40, 40) and picture.dtype == torch.uint8
    assert picture.flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert load_picture(str(tmp_path / "wide.png")).shape == (3, 64, 64)


@pytest.mark.parametrize(("content", "fault"), [(b"this is no picture", "an unreadable picture"), (None, "missing")])
def test_load_picture_says_what_is_wrong(tmp_path, content, fault):
    path = tmp_path / "mine.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"mine\.jpg is .*{fault}.*give the path of a JPEG or PNG file"):
        load_picture(path)
