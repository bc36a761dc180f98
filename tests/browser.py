"""Opens a page in a headless Chromium (Qt WebEngine) and reports what it shows and requests.

The browser runs in its own process, so that a page that crashes it does not end the tests.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_browser = pytest.mark.skipif(
    "PySide6_WebEngine" not in {d.name for d in importlib.metadata.distributions()},
    reason="no browser: pip install PySide6-WebEngine",
)


def open_page(
    page: Path | str, screenshot: Path, width: int = 1200, dark: bool = False, script: str = "null"
) -> dict[str, Any]:
    """Open a file or an address and save a screenshot of the whole page.

    Returns its `title`, its visible `text`, the `errors` on the console, the `requests` for
    anything but the page itself, and `value`, the result of the script in the page.
    """
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if dark else 1}"
    quiet = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    address = page.resolve().as_uri() if isinstance(page, Path) else page
    arguments = [address, str(screenshot), str(width), script]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | quiet
    )
    if done.returncode:
        raise RuntimeError(f"the browser ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _browse(page: str, screenshot: str, width: int, script: str) -> dict[str, Any]:
    from PySide6.QtCore import QEventLoop, QTimer, QUrl
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    errors: list[str] = []
    requests: list[str] = []

    # Qt calls these methods by its own names.
    class Console(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, _: str) -> None:  # noqa: N802
            if level != self.JavaScriptConsoleMessageLevel.InfoMessageLevel:
                errors.append(f"line {line}: {message}")

    class Network(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:  # noqa: N802
            if info.requestUrl() != address:
                requests.append(info.requestUrl().toString())

    def wait(milliseconds: int) -> None:
        loop = QEventLoop()
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def evaluate(code: str) -> Any:
        loop, values = QEventLoop(), []
        shown.runJavaScript(code, 0, lambda value: (values.append(value), loop.quit()))
        loop.exec()
        return values[0]

    _application, address = QApplication([]), QUrl(page)
    view = QWebEngineView()
    shown = Console(view)
    network = Network()
    shown.setUrlRequestInterceptor(network)
    settings, attributes = shown.settings(), QWebEngineSettings.WebAttribute
    # Otherwise the browser blocks the page's requests to the network before Network records them.
    settings.setAttribute(attributes.LocalContentCanAccessRemoteUrls, True)
    settings.setAttribute(attributes.ShowScrollBars, False)
    view.setPage(shown)
    view.resize(width, 800)
    view.show()
    loaded = QEventLoop()
    shown.loadFinished.connect(loaded.quit)
    shown.load(address)
    loaded.exec()
    view.resize(width, int(evaluate("document.documentElement.scrollHeight")))
    evaluate("requestAnimationFrame(() => requestAnimationFrame(() => window.drawn = 1)) && 0")
    while not evaluate("window.drawn"):
        wait(50)
    wait(1000)  # for late events, such as an image's onerror
    before, picture = None, view.grab().toImage()
    while picture != before:  # a tall page is drawn in pieces
        wait(500)
        before, picture = picture, view.grab().toImage()
    picture.save(screenshot)
    text = evaluate("document.body.innerText")
    value = json.loads(evaluate(f"JSON.stringify({script})"))
    result = {"title": shown.title(), "text": text, "value": value}
    return result | {"errors": errors, "requests": requests}


if __name__ == "__main__":
    file, picture, wide, expression = sys.argv[1:]
    print(json.dumps(_browse(file, picture, int(wide), expression)))
