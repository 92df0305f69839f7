"""The report: one self-contained HTML page on a generation. It holds no times: same work, same bytes."""

import base64
import html
import re

from pipeline.data.formats.contact_sheet import grid, png
from pipeline.data.formats.pixels import Pixels
from pipeline.generate.manifest import Statistics
from pipeline.generate.sample_gallery import class_name
from pipeline.generate.spec import Spec, pretty
from pipeline.store import Store

CONTACT_KEY = "contact-sheet.png"
REPORT_KEY = "report.html"
_HEAD_BYTES = 512

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
img { image-rendering: pixelated; max-width: 100% } pre { background: #f5f5f5; padding: 1rem; overflow: auto }
.bar { background: #4a7ab5; height: .9rem; display: inline-block; vertical-align: middle }
"""


def render(
    spec: Spec,
    statistics: Statistics,
    class_names: tuple[str, ...] | None,
    sheet: bytes,
    gallery: dict[int | None, list[Pixels]],
) -> bytes:
    """The page as bytes. `sheet` is the contact sheet's PNG."""
    version = "" if spec.model.version is None else f" version {spec.model.version}"
    title = f"{spec.count:,} samples of {spec.model.name}{version}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _facts(spec, statistics),
        "<h2>Contact sheet</h2>",
        _image(sheet, "contact sheet"),
        _histogram(statistics, class_names),
        _class_grids(gallery, class_names),
        f"<h2>Spec</h2><pre>{html.escape(pretty(spec.model_dump(mode='json')).decode())}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n".encode()


def count_told(store: Store) -> int | None:
    """The count in the title of the stored report; None where that cannot be told. Raises ObjectMissing."""
    with store.open(REPORT_KEY) as file:
        found = re.search(rb"<title>([0-9,]{1,20}) samples of ", file.read(_HEAD_BYTES))
    return None if found is None else int(found[1].replace(b",", b""))


def _facts(spec: Spec, statistics: Statistics) -> str:
    rows = {
        "spec digest": spec.digest,
        "weights": f"{spec.model.weights}, sha256 {spec.model.sha256}",
        "indexes": f"{spec.first_index} to {spec.first_index + spec.count - 1}",
        "images": f"{spec.channels} x {spec.size} x {spec.size}, {spec.image_format}",
        "sampler": f"{spec.sampler.kind}, {spec.sampler.num_steps} steps",
        "channel means (0..255)": ", ".join(f"{value:.2f}" for value in statistics.channel_mean),
        "channel deviations": ", ".join(f"{value:.2f}" for value in statistics.channel_std),
        "constant images": str(statistics.constant),
        "saturated images": str(statistics.saturated),
    }
    return _table([(html.escape(name), html.escape(value)) for name, value in rows.items()])


def _histogram(statistics: Statistics, names: tuple[str, ...] | None) -> str:
    if not statistics.classes:
        return ""
    most = max(statistics.classes.values())
    rows = [
        (
            html.escape(class_name(label, names)),
            f'<span class=bar style="width:{20 * count / most:.2f}rem"></span> {count}',
        )
        for label, count in statistics.classes.items()
    ]
    return f"<h2>Classes</h2>{_table(rows)}"


def _class_grids(gallery: dict[int | None, list[Pixels]], names: tuple[str, ...] | None) -> str:
    parts = [
        f"<h3>{html.escape(class_name(label, names))}</h3>"
        + _image(png(grid([images])), f"class {class_name(label, names)}")
        for label, images in gallery.items()
        if label is not None and images
    ]
    return "<h2>By class</h2>" + "".join(parts) if parts else ""


def _table(rows: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in rows) + "</table>"


def _image(data: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
