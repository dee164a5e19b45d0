"""The report in headless Chromium: nothing is requested, tables sort, nothing overflows."""

import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

from tasks.core.report import Picture, Report, Table, write_report
from tasks.core.report.figures import side_by_side

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

# Runs in the page after its own script: clicks, measures and leaves the findings in the DOM.
PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  const click = (index) => { table.querySelectorAll("th button")[index].click(); return column(); };
  const found = {
    unsorted: column(), down: click(1), up: click(1), name: click(0),
    images: [...document.images].map((image) => image.complete && image.naturalWidth > 0),
    width: document.documentElement.scrollWidth, window: innerWidth,
    alerted: window.alerted === true,
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script></body>"""


def open_page(page, tmp_path, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    run = subprocess.run(
        [*command, *options, page], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    return run.stdout


@pytest.fixture
def report(tmp_path):
    hostile = "<img src=x onerror='window.alerted=true'>"
    rows = [("b", 2.0), (hostile, 30.0), ("a", 11.5), ("missing", float("nan"))]
    labels = np.tile(np.arange(3), (40, 20))
    palette = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    png = side_by_side(np.zeros((40, 60, 3), np.uint8), labels, labels, palette, ["a", "b", "c"])
    curves = {"train/loss": [(step, 1 / (step + 1)) for step in range(50)]}
    return write_report(
        Report(
            "segmentation", "faseg", "A title_without_any_space_that_is_long_for_a_small_screen", {"val/mIoU": 0.5},
            tables=[Table("Per class", ["class", "IoU"], rows)], curves=curves,
            pictures=[Picture("Best cases", hostile, png)], monitor="val/mIoU",
        ),
        tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("width", [1280, 500])  # Chromium's windows are not narrower
def test_page_works_without_requests(report, tmp_path, width):
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body = report.read_text().replace("</body>", PROBE).encode() if self.path == "/report.html" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/report.html"
        dom = open_page(url, tmp_path, "--dump-dom", f"--window-size={width},900")
    finally:
        server.shutdown()
    assert set(requests) <= {"/report.html", "/favicon.ico"}  # the browser itself asks for the icon
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"').replace("&lt;", "<"))
    hostile = found["unsorted"][1]
    assert hostile.startswith("<img")
    assert found["down"] == [hostile, "a", "b", "missing"]
    assert found["up"] == ["b", "a", hostile, "missing"]
    assert found["name"] == [hostile, "a", "b", "missing"]
    assert found["images"] == [True, True]
    assert not found["alerted"]
    assert found["width"] <= found["window"]


def test_screenshot(report, tmp_path):
    open_page(report.as_uri(), tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=800,600")
    assert (tmp_path / "page.png").stat().st_size > 5000
