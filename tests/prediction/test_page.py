"""Pages of results: what they hold, and what a browser shows of them."""

import base64
import re
from html import escape

import numpy as np
import pytest
from PIL import Image

from fastmask.prediction import SegmentMap, page
from tests.helpers.browser import dom, drawn_segments, needs_browser, screenshot

NAMES = ("sky", "<b>car</b>", "tree")
PALETTE = ((250, 0, 0), (0, 250, 0), (0, 0, 250))

# Points at the middle of the first map when it is drawn, and writes its first pixel into the document.
POINT = """<script>
const timer = setInterval(() => {
  const canvases = [...document.querySelectorAll("canvas")];
  if (!canvases.every(({ drawing }) => drawing?.ids)) return;
  clearInterval(timer);
  const canvas = canvases[0];
  const box = canvas.getBoundingClientRect();
  const place = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
  canvas.dispatchEvent(new PointerEvent("pointermove", place));
  document.body.dataset.pixel = canvas.getContext("2d").getImageData(0, 0, 1, 1).data.join();
}, 10);
</script>"""


def two_maps():
    """Left, sky; right, the second car; below, nothing."""
    ids = np.zeros((60, 80), np.int64)
    ids[:, 30:] = 7
    ids[50:] = -1
    found = SegmentMap(ids, {0: 0, 3: 1, 7: 1}, {7: 0.754})
    return {"truth": found._replace(scores={}), "prediction": found}


def write(path, blocks):
    page.write_page(path, "A <title>", "& a lead", blocks)
    return path.read_text(encoding="utf-8")


def test_segments_hold_the_ids_and_names_of_what_occurs():
    text = page.segments(Image.new("RGB", (80, 60)), two_maps(), NAMES, PALETTE, "a/b<c>", "IoU 3 %")
    assert "<b>a/b&lt;c&gt;</b> IoU 3 %" in text
    truth, (ids, found) = drawn_segments(text)
    names = [["sky", [250, 0, 0], None], ["<b>car</b>", [56, 251, 56], None]]
    assert truth[1] == names
    assert found == [names[0], [*names[1][:2], 0.754]]
    assert (ids[:50, :30] == 0).all() and (ids[:50, 30:] == 1).all() and (ids[50:] == 2).all()


def test_large_pictures_are_reduced_and_a_map_of_nothing_is_shown():
    maps = {"prediction": SegmentMap(np.zeros((900, 3000), np.int32), {})}
    text = page.segments(Image.new("RGB", (3000, 900)), maps, (), (), "large")
    assert 'width="800" height="240"' in text and 'data-segments="[]"' in text
    assert len(text) < 10_000


def test_text_is_escaped_everywhere(tmp_path):
    evil = '"><script>alert(1)</script>{0}&amp;'
    photo = Image.new("RGB", (8, 8))
    blocks = [
        page.heading(evil),
        page.paragraph(evil),
        page.numbers({evil: evil}),
        page.table([[evil, evil], [evil, evil]]),
        page.bars([evil], {evil: [0.5]}, PALETTE[:1]),
        page.picture(photo, evil),
        page.segments(photo, {evil: SegmentMap(np.zeros((8, 8), int), {0: 0})}, [evil], PALETTE[:1], evil, evil),
    ]
    page.write_page(tmp_path / "page.html", evil, evil, blocks)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert all(escape(evil) in block or "data-segments" in block for block in blocks)


def test_odd_names_and_scores(tmp_path):
    """A file name with a byte that is no character, and a score that is no number."""
    ids = SegmentMap(np.zeros((8, 8), int), {0: 0}, {0: float("nan")})
    figure = page.segments(Image.new("RGB", (8, 8)), {"prediction": ids}, NAMES, PALETTE, "caf\udce9.jpg")
    text = write(tmp_path / "page.html", [figure])
    assert "caf&#56553;.jpg" in text
    assert drawn_segments(text)[0][1] == [["sky", [250, 0, 0], None]]


def test_bars_are_sorted_and_say_where_there_is_no_score():
    text = page.bars(NAMES, {"IoU": [float("nan"), 0.25, 1.0], "PQ": [0.5, float("nan"), 0.0]}, PALETTE)
    assert [text.index(escape(NAMES[k])) for k in (2, 1, 0)] == sorted(text.index(escape(name)) for name in NAMES)
    assert text.count("–") == 2
    assert "--share:0.2500" in text and ">25.0<" in text
    assert "#0000fa" in text


@pytest.mark.parametrize(("suffix", "kind"), [("png", "png"), ("jpg", "jpeg")])
def test_pictures_are_embedded(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (4, 4)).save(path)
    text = page.picture(path, "curves")
    assert base64.b64encode(path.read_bytes()).decode() in text and f"data:image/{kind};base64" in text


def test_a_picture_without_segments_says_so():
    maps = {"truth": SegmentMap(np.zeros((8, 8), int), {0: 0}), "panoptic": SegmentMap(np.zeros((8, 8), int), {})}
    text = page.segments(Image.new("RGB", (8, 8)), maps, NAMES, PALETTE, "a picture")
    assert "<h3>truth</h3>" in text
    assert "<h3>panoptic: no segments</h3>" in text


def test_an_interruption_leaves_the_earlier_page(tmp_path):
    def interrupted():
        yield page.heading("one")
        raise KeyboardInterrupt

    before = write(tmp_path / "page.html", [page.heading("earlier")])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "page.html", interrupted())
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@needs_browser
def test_a_browser_draws_segments_and_names_them_under_the_pointer(tmp_path):
    figure = page.segments(Image.new("RGB", (80, 60)), two_maps(), NAMES, PALETTE, "a picture")
    write(tmp_path / "page.html", [page.mask_slider(), figure, POINT])
    seen = dom(tmp_path / "page.html", until="document.body.dataset.pixel")
    assert re.findall(r"<output[^>]*>(.*?)</output>", seen) == ["&lt;b&gt;car&lt;/b&gt;", "&lt;b&gt;car&lt;/b&gt; 0.75"]
    # The sky fades while the pointer is over the car.
    red, green, blue, alpha = map(int, re.search(r'data-pixel="(.*?)"', seen).group(1).split(","))
    assert red > 240 and green == blue == 0 and 0 < alpha < 100
    write(tmp_path / "page.html", [page.mask_slider(), figure])
    screenshot(tmp_path / "page.html", tmp_path / "seen.png", (1280, 900))
    colors = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB")).reshape(-1, 3).astype(int)
    reddish = (colors[:, 0] > 80) & (colors[:, 1] < 20) & (colors[:, 2] < 20)
    assert reddish.sum() > 10_000
