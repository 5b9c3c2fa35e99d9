import pytest
from servers import chromium


@pytest.fixture
def page():
    """A page of headless Chromium, 1280 by 900."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        made = browser.new_page(viewport={"width": 1280, "height": 900})
        made.set_default_timeout(60_000)
        yield made
        browser.close()
