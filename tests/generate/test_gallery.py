"""A gallery shows every image of a generation with its facts, and what is beside it fits."""

import hashlib
import html
import io
import re
import shlex
from base64 import b64encode
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.model_card import ModelCard, TrainingData
from ddpm_pipeline.data.formats.contact_sheet import MAX_CELL_PIXELS, scaled
from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.gallery import make_gallery as module
from ddpm_pipeline.generate.gallery.make_gallery import Gallery, make_gallery
from ddpm_pipeline.generate.gallery.pages import PER_PAGE, runs
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.redraw import common_words, own_words
from ddpm_pipeline.generate.spec import Spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.stored_images import stored_images
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import FileStore, ObjectInfo, open_store
from tests.browser import document, needs_browser, screenshot
from tests.generate.tiny import fill, settings, tiny_card, tiny_model, writer_of

HOSTILE = (
    '"><script>document.title="taken"</script>',
    "</style></script><img src=x onerror=\"document.title='taken'\">",
    "{{ 7*7 }} \u202e ' & javascript:alert(1)",
)


class Page(HTMLParser):
    """The tiles, scripts and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tags: list[str] = []
        self.tiles: list[dict[str, str]] = []
        self.links: list[str] = []
        self.places: list[tuple[int, int]] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if "tile" in found.get("class", "").split():
            self.tiles.append(found)
        if tag == "i" and (place := re.fullmatch(r"a x(\d+) y(\d+)", found.get("class", ""))):
            self.places.append((int(place[1]), int(place[2])))
        if tag == "a":
            self.links.append(found["href"])

    def sheet(self, kind: str = "a") -> str:
        """Key of the sheet of the images (a), of those beside them (b), or of the nearest (n)."""
        found = re.search(rf"^\.{kind} \{{ background-image: url\(([^)]+)\) \}}$", self.text, re.M)
        assert found is not None
        return found[1]


@dataclass(frozen=True)
class Made:
    """A generation, its images by index, and a folder for its gallery."""

    config: GenerateConfig
    spec: Spec
    images: dict[int, np.ndarray]
    out: Path

    def gallery(self, **more: object) -> Gallery:
        return make_gallery(self.config.output, str(self.out), **more)  # type: ignore[arg-type] # pyright: ignore

    def page(self, name: str = "index.html") -> Page:
        return Page(self.out / name)


def images_of(generation: Generation) -> dict[int, np.ndarray]:
    spec, store = generation.spec, generation.store
    return {
        image.index: decode_image(image.data, spec.image_shape)
        for unit in shards(spec)
        if store.stat(unit.key) is not None
        for image in stored_images(store.read(unit.key), spec, unit)
    }


def make(folder: Path, card: ModelCard | None = None, name: str = "out", **chosen: object) -> Made:
    """A small generation; made whole in this process."""
    model = tiny_model(folder / "model", card)
    config = settings(model, f"file://{folder}/{name}", **{"count": 25, **chosen})
    spec = fill(config)
    return Made(
        config, spec, images_of(Generation(open_store(config.output), spec)), folder / f"{name}-gallery"
    )


def cell(page: Page, out: Path, place: int, edge: int, kind: str = "a", block: int = 0) -> np.ndarray:
    """The pixels (edge, edge, 3) that the style shows for an image of a page, in the given block of rows."""
    x, y = page.places[place]
    y += block * -(-len(page.tiles) // 16)
    with Image.open(out / page.sheet(kind)) as sheet:
        return np.asarray(sheet.crop((x * edge, y * edge, (x + 1) * edge, (y + 1) * edge)))


def test_every_image_is_shown_once_among_all_and_once_in_its_class(tmp_path: Path) -> None:
    made = make(tmp_path, count=PER_PAGE + 9, shard_size=100, batch_size=100, first_index=5)
    found = made.gallery()
    assert (found.num_images, found.state) == (265, "complete")
    for names, wanted in (
        (["index.html", "all-0002.html"], list(made.images)),
        *(([f"class-{n}-0001.html"], [i for i in made.images if i % 3 == n]) for n in range(3)),
    ):
        pages = [made.page(name) for name in names]
        assert [int(tile["data-index"]) for page in pages for tile in page.tiles] == wanted
        for page in pages:
            assert page.tiles[0]["data-class"] in ("nought", "one", "two")
            for place, tile in enumerate(page.tiles):
                shown = cell(page, made.out, place, 4)
                assert (shown == made.images[int(tile["data-index"])]).all()
    assert found.num_pages == len(list(made.out.glob("*.html"))) == 5


def test_an_image_has_the_command_that_draws_it_again(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.gallery(model=made.config.model)
    page = made.page()
    (common,) = re.findall(r'data-common="([^"]*)"', page.text)
    assert html.unescape(common) == common_words(made.spec, made.config.model)
    assert [tile["data-own"] for tile in page.tiles] == [own_words(made.spec, i, 4) for i in made.images]
    assert page.tiles[9]["data-call"] == "8 to 9"
    assert shlex.split(page.tiles[9]["data-own"])[:2] == ["first_index=8", "count=2"]


def test_a_generation_in_progress_says_so_and_the_same_command_shows_the_rest(tmp_path: Path) -> None:
    made = make(tmp_path)
    store = open_store(made.config.output)
    kept = {key: store.read(key) for key in ("done/000001.json", "manifest.json")}
    for key in kept:
        store.delete(key)
    found = made.gallery()
    assert (found.num_images, found.state) == (15, "in progress: 15 of 25 images")
    page = made.page()
    assert [int(tile["data-index"]) for tile in page.tiles] == [*range(10), *range(20, 25)]
    assert 'data-runs="0-9 20-24"' in page.text
    assert "in progress: 15 of 25 images" in page.text
    assert page.tiles[0]["data-class"] == "0"  # names are in the manifest
    for key, data in kept.items():
        store.write(key, data)
    before = set(made.out.rglob("*.webp"))
    again = made.gallery()
    assert (again.num_images, again.state) == (25, "complete")
    assert again.sheets_kept == 0
    assert not before & set(made.out.rglob("*.webp"))  # what nothing leads to is deleted
    once_more = made.gallery()
    assert (once_more.sheets_written, once_more.sheets_kept) == (0, again.sheets_written)


class Fragile(FileStore):
    """A store that fails at its n-th write."""

    left = 0

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().write(key, data, replaces=replaces)


def test_an_interrupted_gallery_has_no_first_page_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path)
    store = Fragile(made.out)

    def open_fragile(uri: str) -> FileStore:
        assert uri == str(made.out)
        return store

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_store", open_fragile)
        writes = 0
        for writes in range(1, 50):
            store.left = writes
            try:
                made.gallery()
                break
            except KeyboardInterrupt:
                assert not (made.out / "index.html").exists()
        assert writes > 2
    assert len(made.page().tiles) == 25


def test_large_images_are_scaled_down_and_the_page_says_so(tmp_path: Path) -> None:
    made = make(tmp_path, tiny_card(classes=False, size=160), count=2, shard_size=2, batch_size=2)
    made.gallery()
    page = made.page()
    assert f"shown scaled down to {MAX_CELL_PIXELS} pixels" in page.text
    for place, image in enumerate(made.images.values()):
        shown = cell(page, made.out, place, MAX_CELL_PIXELS).astype(int)
        wanted = scaled(image, MAX_CELL_PIXELS).astype(int)
        assert np.abs(shown - wanted).mean() < 12  # a lossy encoding of noise
    assert "data-class" not in page.tiles[0]


def test_only_as_many_images_as_asked_for_are_shown(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.gallery(limit=13).num_images == 13
    page = made.page()
    assert len(page.tiles) == 13
    assert "13 images, the first of 25" in page.text


def test_names_from_a_model_stay_text(tmp_path: Path) -> None:
    made = make(tmp_path, tiny_card().model_copy(update={"class_names": HOSTILE}))
    made.gallery()
    page = made.page()
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert [tile["data-class"] for tile in page.tiles[:3]] == list(HOSTILE)
    assert set(page.links) == {"index.html", *(f"class-{n}-0001.html" for n in range(3))}


@pytest.mark.parametrize("name", ["index.html", "class-1-0001.html"])
def test_the_policy_allows_the_page_its_own_style_and_script_only(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    made.gallery()
    text = made.page(name).text
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src 'self';")
    assert " style=" not in text
    assert not re.search(r" on\w+=", text)


@needs_browser
def test_an_address_with_an_index_leads_to_the_page_of_that_image(tmp_path: Path) -> None:
    made = make(tmp_path, count=PER_PAGE + 4, shard_size=130, batch_size=130)
    made.gallery()
    seen = document(f"{(made.out / 'index.html').as_uri()}#{PER_PAGE + 2}", tmp_path)
    assert f'<h2 id="name">Sample {PER_PAGE + 2}</h2>' in seen


@needs_browser
def test_a_browser_shows_an_image_and_its_command_and_runs_nothing_else(tmp_path: Path) -> None:
    made = make(tmp_path, tiny_card().model_copy(update={"class_names": HOSTILE}))
    made.gallery(model=made.config.model)
    address = (made.out / "index.html").as_uri()
    seen = document(f"{address}#7", tmp_path)
    assert "<title>25 samples of local</title>" in seen
    assert re.search(r"<dialog[^>]* open", seen)
    command = f"{common_words(made.spec, made.config.model)} {own_words(made.spec, 7, 4)}"
    assert f">{html.escape(command, quote=False)}</pre>" in seen
    assert f">{html.escape(HOSTILE[1], quote=False)}</bdi>" in seen
    foreign = made.out / "foreign.html"
    foreign.write_text(
        made.page().text.replace("</body>", "<script>document.title = 'taken'</script></body>")
    )
    assert "<title>25 samples of local</title>" in document(foreign.as_uri(), tmp_path)
    screenshot(address, tmp_path / "page.png", width=600, height=400)
    with Image.open(tmp_path / "page.png") as image:
        levels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(levels, axis=0)) > 50  # the images are drawn, not only text


def test_two_generations_from_the_same_noise_stand_side_by_side(tmp_path: Path) -> None:
    made = make(tmp_path)
    other = make(tmp_path, name="other", sampler=SamplerConfig(kind="ddim", num_steps=2))
    open_store(other.config.output).delete("done/000001.json")
    made.gallery(beside=other.config.output)
    page = made.page()
    for place, index in enumerate(made.images):
        difference = np.abs(made.images[index].astype(int) - other.images[index]).mean()
        is_made = not 10 <= index < 20
        assert page.tiles[place]["data-difference"] == (
            f"{difference:.2f} levels on average" if is_made else ""
        )
        assert (cell(page, made.out, place, 4, "b") == (other.images[index] if is_made else 0)).all()
    ranked = [float(tile["data-difference"].split()[0]) for tile in made.page("differing-0001.html").tiles]
    assert len(ranked) == 15
    assert ranked == sorted(ranked, reverse=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, r"its seeds are not those of .* \(1, not 0\), so it is not from the same noise"),
        ({"first_index": 1}, r"its indexes are not those of .* \(1 to 25, not 0 to 24\)"),
        ({"count": 24}, r"its indexes are not those of .* \(0 to 23, not 0 to 24\)"),
        ({"classes": [2, 1]}, r"its classes are not those of .* \(2, 1, not 0, 1, 2\)"),
    ],
)
def test_generations_from_other_noise_are_refused(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    made = make(tmp_path)
    other = settings(Path(made.config.model), f"file://{tmp_path}/other", **{"count": 25, **changed})
    write_spec(open_store(other.output), writer_of(other).engine.spec)
    with pytest.raises(UserError, match=said):
        made.gallery(beside=other.output)
    assert not made.out.exists()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("digits"))
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=900), None)
    return uri


def test_the_nearest_training_images_stand_beside_each_image(tmp_path: Path, digits: str) -> None:
    index = load_index(digits)
    made = make(tmp_path, tiny_card(size=8, data=TrainingData(digest=index.digest)), count=20)
    made.gallery(data=digits, model=made.config.model)
    page = made.page()
    real = list(read_sequential(index))
    pixels = np.stack([sample.pixels for sample in real]).reshape(len(real), -1).astype(float)
    for place, image in enumerate(made.images.values()):
        distances = np.sqrt(((pixels - image.reshape(-1)) ** 2).sum(1))
        told = page.tiles[place]["data-near"].split("\n")
        assert told == [f"{distance:.1f}" for distance in np.sort(distances)[:3]]
        names = page.tiles[place]["data-near-name"].split("\n")
        for rank, name in enumerate(names):
            shard, key = name.split(", ")
            (row,) = [n for n, s in enumerate(real) if (index.shards[s.shard].name, s.key) == (shard, key)]
            assert f"{distances[row]:.1f}" == told[rank]
            assert (cell(page, made.out, place, 8, "n", block=rank) == real[row].pixels).all()
    closest = [float(tile["data-near"].split()[0]) for tile in made.page("closest-0001.html").tiles]
    assert closest == sorted(closest)


def test_other_data_than_the_models_is_refused(tmp_path: Path, digits: str) -> None:
    for digest, said in (
        ("0" * 64, "is not what local was trained on|is not what .*model"),
        (None, "does not say"),
    ):
        made = make(tmp_path / str(digest)[:4], tiny_card(size=8, data=TrainingData(digest=digest)), count=4)
        with pytest.raises(UserError, match=said):
            made.gallery(data=digits, model=made.config.model)
    with pytest.raises(UserError, match="name it with --model"):
        made.gallery(data=digits)


def test_a_gallery_replaces_nothing_but_its_own(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(UserError, match="lies inside the generation"):
        make_gallery(made.config.output, f"{made.config.output}/gallery")
    made.out.mkdir()
    (made.out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds notes.txt; choose an empty folder by --out"):
        made.gallery()
    (made.out / "notes.txt").unlink()
    made.gallery()
    other = make(tmp_path, name="other", seed=8)
    with pytest.raises(UserError, match="holds the gallery of another generation"):
        make_gallery(other.config.output, str(made.out))
    (made.out / "notes.txt").write_text("mine")
    made.gallery()
    assert (made.out / "notes.txt").read_text() == "mine"


def test_nothing_finished_and_damage_are_told_in_one_line(tmp_path: Path) -> None:
    made = make(tmp_path)
    store = open_store(made.config.output)
    store.write("shards/000001.tar", store.read("shards/000000.tar"))
    with pytest.raises(
        DamageError, match=r"shards/000001.tar: has not the sha256 of its record; run: ddpm verify"
    ):
        made.gallery()
    for info in list(store.list("done/")):
        store.delete(info.key)
    with pytest.raises(UserError, match="no shard is finished yet"):
        made.gallery()


def test_the_command_makes_a_gallery_and_prints_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["gallery", made.config.output])
    assert done.exit_code == 0, done.output
    assert f"next     open {tmp_path}/out-gallery/index.html" in done.stdout
    assert "25 images on 4 pages; the generation is complete" in done.stdout
    refused = CliRunner().invoke(app, ["gallery", f"file://{tmp_path}/model"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


def test_sheets_are_webp_and_runs_are_short() -> None:
    assert runs(np.array([3, 4, 5, 9, 11, 12])) == "3-5 9-9 11-12"
    assert runs(np.array([7])) == "7-7"
    buffer = io.BytesIO(module.make_sheet(np.zeros((3, 4, 4, 1), np.uint8), True).encode())
    with Image.open(buffer) as image:
        assert (image.format, image.size) == ("WEBP", (64, 4))
