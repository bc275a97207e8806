"""A browser in which someone of a team orders a run, approves of it, and finds it registered.

With STILLROOM_SCREENSHOTS set to a folder, what was seen is left there.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, expect, sync_playwright

from tests.flows.house import RUN_SECONDS, House, small_recipe
from tests.flows.team import NEEDS, PASSWORD, USER

BROWSER = shutil.which("chromium")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 30_000  # milliseconds

pytestmark = [
    pytest.mark.integration,
    pytest.mark.service,
    *NEEDS,
    pytest.mark.skipif(BROWSER is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture
def page(team: House) -> Iterator[Page]:
    """A window in which MLflow's login is typed where it is asked for."""
    login = {"username": USER, "password": PASSWORD, "origin": team.mlflow}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900}, http_credentials=login)
        opened.set_default_timeout(PATIENCE)
        yield opened
        browser.close()


@pytest.mark.timeout(600)
def test_order_approve_and_find(
    team: House, page: Page, recipe: dict[str, Any], parts: Path
) -> None:
    small = small_recipe(recipe, parts) | {"name": "clicked", "seed": 91, "adapters": []}
    small["publish"] = {"name": "clicked", "approval": True}
    del small["distillation"]
    (team.terminal.folder / "recipes" / "clicked.yaml").write_text(
        yaml.safe_dump(small, sort_keys=False)
    )

    page.goto(f"{team.prefect}/deployments")
    page.locator("input[type=password]").fill(f"{USER}:{PASSWORD}")
    page.get_by_role("button", name="Login").click()
    page.get_by_role("link", name="compress-named").first.wait_for()
    page.goto(f"{team.prefect}/deployments")  # without the notice that a login was wanted
    page.get_by_role("link", name="compress-named").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    page.get_by_text("name of the file, without its .yaml.").wait_for()
    page.locator("textarea").first.fill("clicked")
    keep(page, "order")
    before = runs(team)
    page.get_by_role("button", name="Submit").click()
    while not (ordered := runs(team) - before):
        page.wait_for_timeout(500)
    (run,) = ordered
    page.goto(f"{team.prefect}/runs/flow-run/{run}")
    page.get_by_text("Suspended", exact=True).first.wait_for(timeout=1000 * RUN_SECONDS)
    page.get_by_role("button", name="Resume", exact=True).click()
    question = page.get_by_role("dialog")
    expect(question).to_contain_text("Shall @champion move to models:/clicked/1")
    expect(question).to_contain_text("quantized teacher")
    question.get_by_role("switch").click()
    question.locator("textarea").fill("looks right")
    keep(page, "approve")
    question.get_by_role("button", name="Submit").click()
    page.get_by_text("Completed", exact=True).first.wait_for(timeout=1000 * RUN_SECONDS)
    page.get_by_text("Artifacts", exact=True).first.click()
    expect(page.get_by_text("report-page").last).to_be_visible()
    keep(page, "artifacts")

    page.goto(f"{team.mlflow}/#/models/clicked/versions/1")
    for text in ("champion", "stillroom.approval", "approved", "looks right", "stillroom.gates"):
        expect(page.get_by_text(text).first).to_be_attached()
    keep(page, "registered")
    # Other links of the page bear the name too, that of the model.
    page.locator("a[href*='/runs/']", has_text="clicked").first.click()
    page.get_by_text("Artifacts", exact=True).first.click()
    expect(page.get_by_text("report.html").first).to_be_attached()


def runs(house: House) -> set[str]:
    """Return the runs that were ever ordered."""
    return {run["id"] for run in house.ask("POST", "/flow_runs/filter", {})}


def keep(page: Page, name: str) -> None:
    folder = os.environ.get("STILLROOM_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1000)  # until what moves has come to rest
        page.screenshot(path=Path(folder) / f"{name}.png")
