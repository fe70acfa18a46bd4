"""The page in a real browser: no error, what can be done on it, names that try to break out, axe, a screenshot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from meshloom.chakra.file import read_all, write
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.view.diff import diff
from meshloom.view.report import diff_page, report
from meshloom.view.scene import scene
from tests.view.browser import browser, opened
from tests.view.scenes import NASTY, run_folder

PICTURE = Path(__file__).parent / "golden" / "timeline.png"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser() as each:
        yield each


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(run_folder(tmp_path_factory.mktemp("run"), num_layers=30))


def errors(page: Any) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector
    )
    return found


def test_it_opens_without_errors_and_tells_everything(page: Any, file: Path) -> None:
    opened(page, file)
    assert errors(page) == []
    heads = texts(page, "h3")
    for name in ("Loss", "Memory", "Faults", "Timeline", "Where the time went", "Measured and predicted", "Ops",
                 "Modules", "Layers", "Communication", "Collectives and messages", "Roofline", "Critical path",
                 "Devices"):  # fmt: skip
        assert name in heads
    assert texts(page, ".device") == ["0", "1"]
    rows = page.execute_script("return window.meshloom.timelines[0].rows.map(row => [row.rank, row.name, row.count])")
    assert [0, "stream 0", 30] in rows
    assert [1, "stream 1", 30] in rows
    assert [0, "compute", 30] in rows, "predicted beside measured"


def test_tables_sort_and_filter(page: Any, file: Path) -> None:
    opened(page, file)
    heads = "[...document.querySelectorAll('h3')]"
    find = f"const sheet = {heads}.find(each => each.textContent === 'Modules').nextElementSibling;"
    cells = find + "return [...sheet.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"
    assert len(page.execute_script(cells)) == 30
    page.execute_script(find + "sheet.querySelector('th button').click()")
    assert page.execute_script(cells)[:3] == ["h.0.mlp", "h.1.mlp", "h.10.mlp"]
    assert page.execute_script(find + "return sheet.querySelector('th').getAttribute('aria-sort')") == "ascending"
    page.execute_script(find + "sheet.querySelector('th button').click()")
    assert page.execute_script(cells)[0] == "h.9.mlp"
    field = page.execute_script(find + "return sheet.querySelector('input')")
    field.send_keys("h.2")
    assert sorted(page.execute_script(cells)) == sorted(["h.2.mlp", *(f"h.2{digit}.mlp" for digit in range(10))])


def test_the_timeline_zooms_pans_and_chooses_by_keyboard(page: Any, file: Path) -> None:
    opened(page, file)
    view = "const line = window.meshloom.timelines[0]; line.draw(); return [line.from, line.to]"
    begin, end = page.execute_script(view)
    canvas = page.find_element("css selector", ".timeline canvas")
    canvas.send_keys("+")
    near, far = page.execute_script(view)
    assert far - near == pytest.approx(0.6 * (end - begin))
    from selenium.webdriver.common.keys import Keys

    canvas.send_keys(Keys.ARROW_RIGHT)
    assert page.execute_script(view)[0] > near
    canvas.send_keys("0")
    assert page.execute_script(view) == pytest.approx([begin, end], abs=0.03 * end)
    canvas.send_keys("n")
    assert "all_reduce_kernel" in texts(page, ".told")[0] or "mm_kernel" in texts(page, ".told")[0]
    page.execute_script(
        "window.meshloom.timelines[0].canvas.dispatchEvent(new WheelEvent('wheel', {deltaY: -300, ctrlKey: true, "
        "clientX: 600, clientY: 60, cancelable: true}))"
    )
    assert page.execute_script(view)[1] - page.execute_script(view)[0] < 0.5 * (end - begin)
    assert errors(page) == []


def test_theme_and_language_switch(page: Any, file: Path) -> None:
    opened(page, file)
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert page.execute_script(ground) == "rgb(255, 255, 255)"
    page.find_element("id", "theme").click()
    assert page.execute_script(ground) == "rgb(20, 23, 27)"
    page.find_element("id", "language").click()
    assert "임계 경로" in texts(page, "h3")
    assert page.execute_script("return document.documentElement.lang") == "ko"
    page.find_element("id", "language").click()
    page.find_element("id", "theme").click()
    page.execute_script("localStorage.clear()")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, file: Path, theme: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python (make installs it)")
    opened(page, file, theme=theme)
    page.execute_script((resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    told = page.execute_async_script("axe.run().then(arguments[0])")
    worst = [
        (each["id"], each["nodes"][0]["html"])
        for each in told["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert worst == []


def test_it_fits_a_phone(page: Any, file: Path) -> None:
    opened(page, file, size=(390, 844))
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert errors(page) == []
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_cannot_break_out(page: Any, tmp_path: Path) -> None:
    path = report(run_folder(tmp_path / "run", name=NASTY))
    opened(page, path)
    assert page.execute_script("return window.hacked") is None
    assert not page.execute_script("return document.querySelectorAll('main img, main script').length")
    assert any(NASTY in text for text in texts(page, "td"))
    assert errors(page) == []
    opened(page, diff_page(diff(scene(tmp_path / "run")), tmp_path / "diff.html"))
    assert page.execute_script("return window.hacked") is None
    assert any(NASTY in text for text in texts(page, "td"))


def test_faults_are_marked(page: Any, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    trace = read_all(folder)[0]
    last = list(trace.nodes)[-1]
    broken = Node(id=last.id, name=last.name, type=NodeType.COMM_COLL, data_deps=[10**6], start_ns=last.start_ns,
                  duration_ns=last.duration_ns, attrs=last.attrs)  # fmt: skip
    write(Trace(nodes=[*list(trace.nodes)[:-1], broken], attrs=trace.attrs), folder / "trace" / "rank0.et")
    opened(page, report(folder))
    assert "dangling-dependency" in texts(page, ".faults")[0]
    marked = page.execute_script("return window.meshloom.timelines[0].data.faults.length")
    assert marked == 2, "measured and predicted"
    assert errors(page) == []


def test_an_empty_trace_has_a_page(page: Any, tmp_path: Path) -> None:
    write(Trace(nodes=[], attrs={"rank": 0}), tmp_path / "rank0.et")
    opened(page, report(tmp_path))
    assert "Nothing was timed" in texts(page, "main")[0]
    assert errors(page) == []


def test_the_timeline_looks_as_it_did(page: Any, file: Path) -> None:
    opened(page, file, size=(1000, 900))
    page.execute_script(
        "const line = window.meshloom.timelines[0]; line.host = true; line.look(0, line.length / 3); line.draw()"
    )
    body = page.find_element("css selector", ".timeline canvas").screenshot_as_png
    picture = Image.open(io.BytesIO(body)).convert("RGB")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    if not PICTURE.is_file():
        PICTURE.parent.mkdir(exist_ok=True)
        picture.save(PICTURE, optimize=True)
        pytest.fail(f"{PICTURE} was missing and is made now: look at it, and commit it")
    golden = Image.open(PICTURE).convert("RGB")
    assert picture.size == golden.size
    # fonts differ between machines: slices do not, and they are most of the picture
    box = (140, 30, *picture.size)
    difference = (
        ImageChops.difference(picture.crop(box), golden.crop(box))
        .convert("L")
        .point(lambda value: 255 if value > 48 else 0)
    )
    share = sum(difference.histogram()[255:]) / (difference.size[0] * difference.size[1])
    assert share < 0.02
