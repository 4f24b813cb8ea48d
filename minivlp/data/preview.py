"""Make again what the folder `data` shows of the picture book: `python -m minivlp.data.preview`.

It writes `preview/` (48 pictures with their captions: an imagefolder that `load_pairs` can read, and a page to look
at), the contact sheet, and the course's map for the README pages; the tokenizer only where its file is missing,
because trained models depend on its ids. The same code gives the same files, and the tests compare them with the code.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from minivlp.data.picturebook.describe import captions
from minivlp.data.picturebook.draw import draw, draw_many
from minivlp.data.picturebook.sample import sample
from minivlp.data.picturebook.world import Scene
from minivlp.data.text import DEFAULT_FILE, Tokenizer, picturebook_texts

# (split, tier, pictures): test scenes, so that the preview shows no training picture.
PREVIEW = (
    ("test", "easy", 12),
    ("test", "normal", 20),
    ("test", "hard", 8),
    ("crayon", "normal", 4),
    ("chalk", "normal", 4),
)
PICTURE = 64  # pixels, what the models see
SHEET_COLUMNS, SHEET_PICTURE, SHEET_GAP = 8, 112, 6  # pixels

PAGE_HEAD = """# A look into the picture book

48 pictures as the models see them, 64x64, each with its five captions from coarse to full. What all of this is stands
in the [dataset card](../README.md); `load_pairs("data/preview")` loads this folder. Made by
`python -m minivlp.data.preview`.

| picture | split, tier | captions |
|---|---|---|
"""


def preview_scenes() -> list[Scene]:
    """The 48 scenes of the preview, in its order."""
    return [sample(i, split=split, tier=tier, seed=0) for split, tier, count in PREVIEW for i in range(count)]


def file_name(scene: Scene) -> str:
    return f"{scene.split}-{scene.tier}-{scene.index:02d}.png"


def write_preview(folder: Path) -> None:
    """Pictures, a metadata.jsonl with `file_name`, `captions`, `split`, `tier`, and the same as a page, README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    scenes = preview_scenes()
    lines: list[str] = []
    page = [PAGE_HEAD]
    for scene, png in zip(scenes, draw_many(scenes, size=PICTURE, workers=1, progress=False), strict=True):
        with Image.open(io.BytesIO(png)) as picture:
            picture.save(folder / file_name(scene), optimize=True)
        facts = {"captions": captions(scene), "split": scene.split, "tier": scene.tier}
        lines.append(json.dumps({"file_name": file_name(scene), **facts}) + "\n")
        page.append(f"| ![]({file_name(scene)}) | {scene.split}, {scene.tier} | {'<br>'.join(facts['captions'])} |\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    (folder / "README.md").write_text("".join(page), encoding="utf-8", newline="\n")


def contact_sheet(scenes: list[Scene]) -> Image.Image:
    """The scenes side by side in reading order, drawn larger than the models see them."""
    step = SHEET_PICTURE + SHEET_GAP
    rows = -(-len(scenes) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * step + SHEET_GAP, rows * step + SHEET_GAP), "white")
    for i, scene in enumerate(scenes):
        row, column = divmod(i, SHEET_COLUMNS)
        sheet.paste(draw(scene, size=SHEET_PICTURE), (SHEET_GAP + column * step, SHEET_GAP + row * step))
    return sheet


def main() -> None:
    from minivlp import diagrams, plots  # for the README's map alone: the data itself draws no diagrams

    plots.use_style()
    folder = DEFAULT_FILE.parent
    write_preview(folder / "preview")
    # 256 colours are plenty for flat drawings and keep the sheet a third of the size.
    sheet = contact_sheet(preview_scenes()).quantize(256, dither=Image.Dither.NONE)
    sheet.save(folder / "contact_sheet.png", optimize=True)
    (folder.parent / "notebooks").mkdir(exist_ok=True)
    diagrams.course_map().savefig(folder.parent / "notebooks" / "course_map.png", dpi=130)
    written = "preview/, contact_sheet.png, ../notebooks/course_map.png"
    if not DEFAULT_FILE.exists():  # new ids would make every model trained with the old ones useless
        Tokenizer.train(picturebook_texts()).save(DEFAULT_FILE)
        written += f", {DEFAULT_FILE.name}"
    print(f"{folder.name}/: wrote {written}")


if __name__ == "__main__":
    main()
