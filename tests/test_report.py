"""The review page in a real browser, what it exports, and what the exported decisions do to label files."""

from __future__ import annotations

import csv
import html
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synth_refine import cli
from synth_refine._io.atomic import file_hash
from synth_refine._io.check import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine.labels.artifact import NO_CLASS, WrongBase, WrongIds, read_artifact, record, write_artifact
from synth_refine.labels.audit import audit_sample
from synth_refine.labels.files import read_labels_and_ids, write_labels
from synth_refine.labels.review import reviewed
from synth_refine.refine.prototypes import prototype_quality
from synth_refine.review.charts import Review
from synth_refine.review.evidence import (
    Evidence,
    Quality,
    SweepRow,
    duplicated,
    nearest_synthetic,
    read_evidence,
    shown_rows,
    taken_from,
    unreadable,
    write_evidence,
)
from synth_refine.review.report import ALONE_SIDE, write_report

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
HOSTILE = (
    "</script><script>window.pwned = 1; alert(1)</script>",
    '"><img src=x onerror="window.pwned = 2"> <!--',
    "=cmd|' /C calc'!A0",
    "{{ 7 * 7 }} ' &amp; \u2028 \u202e<b>cat</b>",
)


def picture(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def review_of(count: int = 120, classes: tuple[str, ...] = ("cat", "dog", "frog"), *, prefix: str = "") -> Review:
    """Every third row is changed, every tenth of the others undecided; confidences differ."""
    random = np.random.default_rng(0)
    rows = np.arange(count)
    given = rows % len(classes)
    change = rows % 3 == 0
    proposed = np.where(change, (given + 1 + rows // 3 % (len(classes) - 1)) % len(classes), given)
    action = np.where(change, "change", np.where(rows % 10 == 1, "abstain", "keep"))
    labels = np.arange(10 * len(classes)) // 10
    features = np.eye(len(classes), 8)[labels] + 0.1 * random.standard_normal((len(labels), 8))
    features[0] = features[-1] + 0.01
    artifact = record(
        given,
        proposed,
        num_classes=len(classes),
        ids=[f"{prefix}{classes[label]}/{row}.png" for row, label in enumerate(given)],
        abstained=action == "abstain",
        confidence=np.round(random.permutation(count) / count, 4),
        reason=np.where(change, "more probable", "too close"),
        settings={"classes": list(classes)},
    )
    evidence = Evidence(
        rows=rows,
        nearest=np.stack([proposed * 10 + 1, proposed * 10 + 2, np.full(count, -1)], axis=1),
        synthetic_labels=labels,
        synthetic_ids=[f"{row}.png" for row in range(len(labels))],
        threshold=0.6,
        sweep=[SweepRow(step / 10, 0.5 - step / 20, 0.1 + step / 50, float("nan"), 0) for step in range(10)],
        quality=taken_from(Quality, prototype_quality(features, labels)),
        notes={"seed": "0", "encoder": "a name that is longer than a number"},
    )
    return Review(artifact, evidence, picture, lambda row: picture(1000 + row))


def showing(review: Review, **changes: Any) -> Review:
    """The same review with other evidence."""
    return replace(review, evidence=replace(review.evidence, **changes))


def thoughtful(review: Review) -> Review:
    """The same review with the most probable other class of every image; the higher its row, the higher the odds."""
    artifact = review.artifact
    other = np.where(artifact.action == "change", artifact.labels, (artifact.given + 1) % artifact.num_classes)
    return showing(review, probable=other, odds=np.arange(1, len(other) + 1) / 50)


def changed(review: Review) -> list[int]:
    return review.artifact.changed.tolist()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in a fresh profile; afterwards nothing may have been logged, asked or fetched from elsewhere."""
    contexts, trouble = [], []

    def requested(request: Any) -> None:
        if not request.url.startswith(("file://", "data:", "blob:")):
            trouble.append(f"request {request.url}")

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # a picture whose card went before it came
            trouble.append(f"failed: {request.url[:80]} {request.failure}")

    def asked(dialog: Any) -> None:
        trouble.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def open_page(path: Path, script: str = "", **options: Any) -> Any:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options}
        )
        context.set_default_timeout(60_000)
        if script:
            context.add_init_script(script)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on("request", requested)
        tab.on("requestfailed", failed)
        tab.on("dialog", asked)
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `review_of()`."""
    return write_report(review_of(), tmp_path_factory.mktemp("small"))


def names(tab: Any) -> list[str]:
    return list(tab.locator(".card .name").all_inner_texts())


def until(tab: Any, condition: str) -> None:
    """Wait for a condition in the page; playwright's own way would need eval, which the page's policy forbids."""
    for _ in range(2_000):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(25)
    pytest.fail(f"still not: {condition}")


def tally(tab: Any) -> str:
    return str(tab.locator("#tally").inner_text())


def export(tab: Any, path: Path) -> list[dict[str, str]]:
    with tab.expect_download() as download:
        tab.click("#export")
    assert download.value.suggested_filename == "decisions.csv"
    download.value.save_as(path)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pick(tab: Any, name: str) -> None:
    """Choose a label in the dialog for corrections with the keyboard alone."""
    tab.locator("#class").press_sequentially(name)
    tab.keyboard.press("Enter")


# ---- the page ----


def test_copies_are_shown_group_by_group_and_removed(tmp_path: Path, visit: Callable[..., Any]) -> None:
    review = review_of()
    groups = np.zeros(len(review.evidence.rows), dtype=np.int64)
    groups[[0, 5, 3, 4]] = 2, 2, 1, 1
    finding = duplicated(["two groups of copies"], [("1", "a.png", "images", "cat", "near", "0.99")])
    tab = visit(write_report(showing(review, copies=groups, findings=finding), tmp_path))
    tab.get_by_text("Show them among the images").click()
    ids = [review.artifact.names[row] for row in review.evidence.rows[[3, 4, 0, 5]].tolist()]
    assert sorted(names(tab)[:2]) == sorted(ids[:2])
    assert sorted(names(tab)[2:]) == sorted(ids[2:])
    first = names(tab)[0]
    tab.keyboard.press("d")
    assert [(one["id"], one["decision"]) for one in export(tab, tmp_path / "decisions.csv")] == [(first, "remove")]


def test_the_page_shows_numbers_charts_and_pictures(small: Path, visit: Callable[..., Any]) -> None:
    review, tab = review_of(), visit(small)
    numbers = tab.locator(".numbers").first.inner_text()
    assert "120" in numbers
    assert f"{len(changed(review))}" in numbers
    assert tab.locator(".facts dt, .facts dd").all_text_contents() == ["encoder", "a name that is longer than a number"]
    assert tab.locator(".card").count() == len(changed(review))
    assert tab.locator(".card .near img").count() == 2 * len(changed(review))
    pairs = tab.locator(".pairs li").all_inner_texts()
    counts = [int(text.split()[-1]) for text in pairs]
    assert sum(counts) == len(changed(review))
    assert counts == sorted(counts, reverse=True)
    bars = tab.evaluate(
        "[...document.querySelectorAll('.bar-change')].filter((bar) => bar.getBBox().height > 0).length"
    )
    assert bars > 10
    assert tab.locator(".threshold").count() == 2
    tab.locator("#sweep-title ~ details summary").click()
    sweep = tab.locator("#sweep-title ~ details tbody tr").all_inner_texts()
    assert [line.split() for line in sweep[:2]] == [
        ["0.00", "50.0%", "10.0%", "unknown", "0"],
        ["0.10", "45.0%", "12.0%", "unknown", "0"],
    ]
    assert "1 look like another class" in tab.locator("#quality-title + .hint").inner_text()
    assert "intended as cat, looks like frog" in tab.locator(".unusable").inner_text()
    tab.evaluate("document.querySelectorAll('img').forEach((image) => (image.loading = 'eager'))")
    until(
        tab,
        "[...document.images].filter((image) => image.src).every((image) => image.complete && image.naturalWidth > 0)",
    )


def test_thresholds_of_the_classes_are_told_apart_from_one(tmp_path: Path) -> None:
    def legends(threshold: Any) -> list[str]:
        page = write_report(showing(review_of(), threshold=threshold), tmp_path).read_text()
        return [html.unescape(text) for text in re.findall('<span class="key key-threshold">(.*?)</span>', page)]

    assert legends(0.6) == ["threshold 0.6", "threshold 0.6"]
    mean = "mean of the classes' thresholds, 0.6 (0.5 to 0.7); what counts is the new class's"
    assert legends([0.5, 0.7, np.inf]) == [mean, mean]
    assert legends([np.inf, np.inf, np.inf]) == legends(None) == []


def luminance(color: str) -> float:
    """Of WCAG 2, in [0, 1]."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [0, 1])
def test_colors_can_be_told_from_what_is_behind_them(dark: int) -> None:
    css = resources.files("synth_refine.review").joinpath("page", "page.css").read_text("utf-8")
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    colors = {name: pair[dark] for name, *pair in found}
    shades = ("accent", "accept", "reject", "correct")
    text = [(name, behind) for name in ("text", "dim", *shades) for behind in ("back", "panel")]
    text += [("text", "warn"), *(("on-accent", shade) for shade in shades)]
    graphics = [(name, "panel") for name in ("edge", "change", "abstain")]
    for pairs, least in ((text, 4.5), (graphics, 3.0)):
        for name, behind in pairs:
            low, high = sorted(luminance(colors[one]) for one in (name, behind))
            assert (high + 0.05) / (low + 0.05) >= least, (name, behind)


def test_filters_and_sorting(small: Path, visit: Callable[..., Any]) -> None:
    review, tab = review_of(), visit(small)
    artifact = review.artifact
    rows = changed(review)
    sure = [artifact.ids[row] for row in sorted(rows, key=lambda row: -artifact.confidence[row])]
    assert names(tab) == sure
    tab.select_option("#sort", "unsure")
    assert names(tab) == sure[::-1]
    tab.select_option("#sort", "row")
    assert names(tab) == [artifact.ids[row] for row in rows]
    tab.select_option("#sort", "pair")
    pairs = [(artifact.given[row], artifact.labels[row]) for row in map(list(artifact.ids).index, names(tab))]
    assert pairs == sorted(pairs)
    tab.select_option("#new", label="frog")
    expected = [artifact.ids[row] for row in rows if artifact.labels[row] == 2]
    assert sorted(names(tab)) == sorted(expected)
    tab.fill("#low", "0.3")
    tab.fill("#high", "0.8")
    expected = [
        artifact.ids[row] for row in rows if artifact.labels[row] == 2 and 0.3 <= artifact.confidence[row] <= 0.8
    ]
    assert sorted(names(tab)) == sorted(expected)
    tab.fill("#text", "/9")
    assert names(tab) == [one for one in names(tab) if "/9" in one]
    tab.fill("#text", "nothing is called so")
    assert tab.locator("#found").inner_text() == "No image fits these filters."
    tab.click("#reset")
    assert tab.locator(".card").count() == len(rows)
    first = tab.locator(".pairs button").first
    first.click()
    assert tab.locator(".card").count() == int(first.inner_text().split()[-1])
    tab.click("#reset")
    tab.select_option("#kind", "1")
    assert tab.locator(".card").count() == int((artifact.action == "abstain").sum())


def test_decide_with_the_keyboard_alone(small: Path, visit: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit(small)
    order = names(tab)
    press = tab.keyboard.press
    press("ArrowDown")
    press("a")
    assert "0 of" in tally(tab)  # outside the images keys belong to the browser
    press("ArrowRight")
    assert tab.evaluate("document.activeElement.className") == "card"
    press("a")
    press("r")
    assert "1 accepted, 1 kept as given" in tally(tab)
    assert tab.evaluate("document.activeElement.querySelector('.name').innerText") == order[2]
    assert f"Kept as given: {order[1]}" in tab.locator("#live").inner_text()
    press("c")
    pick(tab, "cat")
    press("ArrowRight")
    press("j")
    press("k")
    press("a")
    assert "4 of" in tally(tab)
    press("u")
    press("Control+z")
    assert "2 of" in tally(tab)
    for _ in range(3):
        press("ArrowLeft")
    press("x")
    assert "1 accepted, 0 kept as given" in tally(tab)
    press("u")
    assert "1 accepted, 1 kept as given" in tally(tab)
    press("c")
    assert tab.locator("#correct").is_visible()
    press("Escape")
    assert not tab.locator("#correct").is_visible()
    press("?")
    assert tab.locator("#help").is_visible()
    press("Escape")
    tab.focus("#text")
    tab.keyboard.type("arxcu?")  # letters, not commands
    assert "2 of" in tally(tab)
    rows = export(tab, tmp_path / "decisions.csv")
    assert {row["decision"] for row in rows} == {"accept", "reject"}
    assert {row["id"] for row in rows} == set(order[:2])


def test_decide_with_the_mouse(small: Path, visit: Callable[..., Any], tmp_path: Path) -> None:
    review, tab = review_of(), visit(small)
    artifact = review.artifact
    order = names(tab)
    cards = tab.locator(".card")
    cards.nth(0).locator(".accept").click()
    cards.nth(1).locator(".reject").click()
    cards.nth(2).locator(".accept").click()
    cards.nth(2).locator(".accept").click()  # again takes it back
    row = artifact.ids.index(order[3])
    third = ({0, 1, 2} - {int(artifact.given[row]), int(artifact.labels[row])}).pop()
    cards.nth(3).locator(".correct").click()
    tab.select_option("#class", str(third))
    tab.click("#correct-take")
    assert cards.nth(3).get_attribute("data-state") == "correct"
    assert f"corrected to {review.classes[third]}" in (cards.nth(3).get_attribute("aria-label") or "")
    assert "1 accepted, 1 kept as given, 1 corrected" in tally(tab)
    tab.select_option("#state", "correct")
    assert names(tab) == [order[3]]
    tab.select_option("#state", "open")
    assert names(tab) == [order[2], *order[4:]]
    written = {
        row["id"]: (row["given"], row["decision"], row["label"]) for row in export(tab, tmp_path / "decisions.csv")
    }
    where = [artifact.ids.index(one) for one in order]
    given, proposed = ([review.classes[labels[row]] for row in where] for labels in (artifact.given, artifact.labels))
    assert written == {
        order[0]: (given[0], "accept", proposed[0]),
        order[1]: (given[1], "reject", given[1]),
        order[3]: (given[3], "correct", review.classes[third]),
    }


def test_accept_all_takes_what_the_filters_show_and_is_one_step(small: Path, visit: Callable[..., Any]) -> None:
    tab = visit(small)
    tab.select_option("#new", label="dog")
    tab.locator(".card .reject").first.click()
    shown = tab.locator(".card").count()
    assert 1 < shown < len(changed(review_of()))
    tab.click("#bulk-accept")
    assert f"{shown - 1} accepted, 1 kept as given" in tally(tab)
    assert tab.locator("#bulk-what").inner_text() == f"All {shown} shown:"  # none is open: decided ones change again
    tab.click("#undo")
    assert "0 accepted, 1 kept as given" in tally(tab)


def test_undecided_images_name_the_probable_class_and_a_r_c_d_work_at_once(
    visit: Callable[..., Any], tmp_path: Path
) -> None:
    review = thoughtful(review_of())
    artifact = review.artifact
    tab = visit(write_report(review, tmp_path))
    assert tab.locator("#bulk-accept").inner_text() == "Accept new label"
    tab.select_option("#kind", "1")
    assert tab.locator("#bulk-accept").inner_text() == "Accept probable class"
    rows = [list(artifact.ids).index(one) for one in names(tab)]
    texts = tab.locator(".card .labels").all_inner_texts()
    probable = [(int(artifact.given[row]) + 1) % 3 for row in rows]
    assert texts == [
        f"{review.classes[artifact.given[row]]} probably {review.classes[right]}?"
        for row, right in zip(rows, probable, strict=True)
    ]
    tab.click("header a[href='#review']")
    for key in "ard":
        tab.keyboard.press(key)
    tab.keyboard.press("c")
    third = (probable[3] + 1) % 3
    pick(tab, review.classes[third])
    found = {row["id"]: (row["decision"], row["label"]) for row in export(tab, tmp_path / "decisions.csv")}
    given = [review.classes[artifact.given[row]] for row in rows]
    assert found == {
        artifact.ids[rows[0]]: ("accept", review.classes[probable[0]]),
        artifact.ids[rows[1]]: ("reject", given[1]),
        artifact.ids[rows[2]]: ("remove", given[2]),
        artifact.ids[rows[3]]: ("correct" if third != artifact.given[rows[3]] else "reject", review.classes[third]),
    }
    tab.click("#bulk-accept")
    assert tab.locator(".card[data-state=accept]").count() == len(rows) - 3


def test_a_proposed_removal_is_accepted_as_one(visit: Callable[..., Any], tmp_path: Path) -> None:
    review = thoughtful(review_of(30))
    artifact = review.artifact
    row = int(np.flatnonzero(artifact.action == "abstain")[0])
    reason = artifact.reason.copy()
    reason[row] = NO_CLASS
    artifact = replace(artifact, reason=reason)
    tab = visit(write_report(replace(review, artifact=artifact), tmp_path))
    tab.select_option("#kind", "1")
    tab.select_option("#reason", label=NO_CLASS)
    assert tab.locator(".card .labels").all_inner_texts() == ["dog perhaps none of the classes"]
    tab.click("header a[href='#review']")
    tab.keyboard.press("a")
    [decision] = export(tab, tmp_path / "decisions.csv")
    assert decision == {"id": artifact.ids[row], "given": "dog", "decision": "remove", "label": "dog"}
    assert reviewed(artifact, tmp_path / "decisions.csv").removed.tolist() == [row]


def test_several_images_at_once_also_decided_ones(visit: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit(write_report(thoughtful(review_of()), tmp_path))
    cards, states = tab.locator(".card"), "[...document.querySelectorAll('.card')].map((one) => one.dataset.state)"
    cards.nth(1).locator(".name").click()
    cards.nth(4).locator(".name").click(modifiers=["Shift"])
    assert tab.locator("#bulk-what").inner_text() == "4 chosen images:"
    tab.keyboard.press("a")
    assert tab.evaluate(states)[:6] == ["open", *["accept"] * 4, "open"]
    cards.nth(3).locator(".name").click()
    tab.keyboard.press("Space")
    tab.keyboard.press("Shift+ArrowRight")
    tab.keyboard.press("Shift+ArrowRight")
    tab.click("#bulk-reject")
    assert tab.evaluate(states)[:7] == ["open", "accept", "accept", *["reject"] * 3, "open"]
    corners = [cards.nth(place).bounding_box() for place in (0, 2)]
    tab.mouse.move(corners[0]["x"] + 30, corners[0]["y"] + 30)
    tab.mouse.down()
    tab.mouse.move(corners[1]["x"] + 40, corners[1]["y"] + 40, steps=4)
    tab.mouse.up()
    assert tab.locator("#bulk-what").inner_text() == "3 chosen images:"
    assert not tab.locator("#full").is_visible()
    tab.keyboard.press("d")
    assert tab.evaluate(states)[:4] == ["remove"] * 3 + ["reject"]
    tab.keyboard.press("u")
    tab.keyboard.press("u")
    assert tab.evaluate(states)[:6] == ["open", *["accept"] * 4, "open"]


def test_kept_labels_can_be_called_up_by_class_the_most_suspicious_first(
    visit: Callable[..., Any], tmp_path: Path
) -> None:
    review = thoughtful(review_of())
    artifact = review.artifact
    tab = visit(write_report(review, tmp_path))
    table = tab.locator(".classes tbody tr").all_inner_texts()
    assert table[0].split()[:3] == ["cat", "40", "0"]  # given, and after
    tab.get_by_role("button", name="Suspicious kept labels of frog").click()
    kept = [row for row in range(120) if artifact.action[row] == "keep" and artifact.given[row] == 2]
    assert names(tab) == [artifact.ids[row] for row in kept[::-1]]
    assert tab.locator(".card .labels").first.inner_text() == "frog or cat?"
    tab.keyboard.press("a")
    assert tally(tab).startswith("0 of 48 decided")
    assert "1 of them kept labels" in tally(tab)
    [row] = export(tab, tmp_path / "decisions.csv")
    assert row == {"id": artifact.ids[kept[-1]], "given": "frog", "decision": "correct", "label": "cat"}
    assert reviewed(artifact, tmp_path / "decisions.csv").labels[kept[-1]] == 0
    tab.click("#reset")
    tab.select_option("#kind", "0")
    assert names(tab) == [artifact.ids[row] for row in changed(review)[::-1]]  # the largest odds first
    tab.select_option("#sort", "unsure")
    assert names(tab)[0] == artifact.ids[min(changed(review), key=lambda row: abs(np.log((row + 1) / 50)))]


def test_a_picture_in_full_size_with_the_same_keys(visit: Callable[..., Any], tmp_path: Path) -> None:
    review = replace(review_of(30, prefix="a #%?ä/"), folder=tmp_path / "photos of 1 %")
    for row, one in enumerate(review.artifact.ids):
        place = tmp_path / "photos of 1 %" / one
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(row, 500).save(place)
    tab = visit(write_report(review, tmp_path / "page"))
    width = "document.getElementById('full-image').naturalWidth"
    tab.locator("img.picture").nth(1).click()
    until(tab, f"{width} === 500")
    first = tab.locator("#full-image").get_attribute("src")
    tab.keyboard.press("a")
    assert tab.locator("#full-image").get_attribute("src") != first
    assert "1 accepted" in tally(tab)
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#full .verdict").inner_text() == "accepted"
    tab.locator("#full .remove").click()
    tab.keyboard.press("Escape")
    assert not tab.locator("#full").is_visible()
    assert "0 accepted, 0 kept as given, 0 corrected, 1 removed" in tally(tab)
    tab.keyboard.press("Enter")
    assert tab.locator("#full").is_visible()
    until(tab, f"{width} === 500")


def test_the_audit_is_blind_and_its_estimate_is_that_of_the_command(
    visit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    review = review_of()
    artifact = review.artifact
    write_artifact("refined", artifact)
    tab = visit(write_report(review, tmp_path / "page", audit=12))
    for place in (0, 1):
        tab.locator(".card .accept").nth(place).click()
    tab.locator("#audit-open").focus()
    tab.keyboard.press("Enter")
    sample = audit_sample(artifact, 12).tolist()
    assert len(sample) == 24
    for place, row in enumerate(sample[:-1]):
        text = tab.locator("#audit").inner_text()
        assert f"Image {place + 1} of 24" in text
        assert artifact.ids[row] not in text
        assert not re.search("given|proposed|kept|change", text)
        offered = tab.locator("#audit-choices bdi").all_inner_texts()
        assert sorted(offered) == ["cat", "dog", "frog"]
        tab.keyboard.press("d" if row % 7 == 0 else "x" if row % 11 == 0 else str(1 + offered.index("dog")))
    tab.click("#audit-stop")
    tab.reload()
    assert tab.locator("#audit-open").inner_text() == "Resume (23 of 24)"
    shown = {name: tab.locator(f"#audit-{name}").inner_text() for name in ("before", "proposed", "after")}
    rows = export(tab, tmp_path / "decisions.csv")
    assert [row["id"] for row in rows if row["decision"].startswith("audit")] == [
        artifact.ids[row] for row in sample[:-1]
    ]
    assert cli.main(["review", "refined", "decisions.csv", "--out", "reviewed"]) == 0
    found = read_artifact("reviewed").run["audit"]
    for name, text in shown.items():
        assert text == "{:.1f} % ({:.1f} % to {:.1f} %)".format(*(100 * value for value in found[name])), name
    assert found["before"] != found["proposed"]
    other = visit(tmp_path / "page" / "report.html")
    other.set_input_files("#import", tmp_path / "decisions.csv")
    until(other, "document.getElementById('tally').innerText.startsWith('2 of')")
    assert other.locator("#audit-after").inner_text() == shown["after"]


def test_a_single_file_keeps_its_pictures_wherever_it_goes(
    visit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synth_refine.review.report.EMBEDDED_BYTES", 100)
    said: list[str] = []
    review = replace(review_of(30), folder=tmp_path / "nowhere")
    page = write_report(review, tmp_path / "page", single_file=True, say=said.append)
    [size] = [float(text.split()[-2]) for text in said]
    assert size == pytest.approx(page.stat().st_size / 1e6, abs=0.2)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    moved = page.rename(tmp_path / "moved.html")
    tab = visit(moved)
    assert "file:" not in (tab.locator("meta[http-equiv]").get_attribute("content") or "")
    tab.locator("img.picture").first.click()
    until(tab, "document.getElementById('full-image').naturalWidth > 0")


def test_a_reload_keeps_decisions_and_another_review_has_its_own(
    small: Path, visit: Callable[..., Any], tmp_path: Path
) -> None:
    tab = visit(small)
    tab.locator(".card .accept").first.click()
    tab.reload()
    assert "1 accepted" in tally(tab)
    assert tab.locator(".card").first.get_attribute("data-state") == "accept"
    tab.goto(write_report(review_of(prefix="other/"), tmp_path).as_uri())
    assert "0 of" in tally(tab)


@pytest.mark.parametrize("broken", ["setItem", "getItem"])
def test_without_storage_the_page_says_so_and_works(
    broken: str, small: Path, visit: Callable[..., Any], tmp_path: Path
) -> None:
    tab = visit(small, f"Storage.prototype.{broken} = () => {{ throw new Error('full'); }}")
    assert "does not keep your decisions" in tab.locator("#problem").inner_text()
    tab.locator(".card .accept").first.click()
    assert len(export(tab, tmp_path / "decisions.csv")) == 1


def test_exported_decisions_can_be_loaded_again(small: Path, visit: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit(small)
    tab.locator(".card .accept").first.click()
    tab.locator(".card .reject").last.click()
    first = export(tab, tmp_path / "decisions.csv")
    other = visit(small)  # a fresh profile: another machine
    assert "0 of" in tally(other)
    other.set_input_files("#import", tmp_path / "decisions.csv")
    until(other, "document.getElementById('tally').innerText.startsWith('2 of')")
    assert export(other, tmp_path / "again.csv") == first
    (tmp_path / "no.csv").write_text("<html>")
    other.set_input_files("#import", tmp_path / "no.csv")
    until(other, "document.getElementById('found').innerText.includes('no file of decisions')")


# ---- text of strangers ----


def hostile() -> Review:
    review = showing(review_of(60, HOSTILE), notes=dict.fromkeys(HOSTILE, HOSTILE[1]))
    reason = np.where(review.artifact.action == "change", HOSTILE[0], "").astype(object)
    ids = [f"{HOSTILE[row % 4]}{row}" for row in range(60)]
    return replace(review, artifact=replace(review.artifact, ids=ids, reason=reason))


def test_hostile_names_do_nothing_and_come_back_as_they_were(visit: Callable[..., Any], tmp_path: Path) -> None:
    review = hostile()
    tab = visit(write_report(review, tmp_path, title=HOSTILE[0]))
    assert tab.title() == HOSTILE[0]
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("script").count() == 2
    assert tab.locator("img[src=x], b").count() == 0
    shown = tab.evaluate("[...document.querySelectorAll('.card .name')].map((one) => one.textContent)")
    assert set(shown) == {review.artifact.ids[row] for row in changed(review)}
    tab.click("#bulk-accept")
    tab.locator(".card .reject").first.click()
    tab.locator(".card .correct").last.click()
    tab.select_option("#class", "3")
    tab.click("#correct-take")
    assert tab.evaluate("window.pwned") is None
    rows = export(tab, tmp_path / "decisions.csv")
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {row["decision"] for row in rows} >= {"accept", "reject"}


def test_the_policy_stops_what_escaping_would_have_missed(small: Path, browser: Any) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(small.as_uri())
    tab.evaluate(
        """() => {
          window.stopped = [];
          const stopped = (event) => window.stopped.push(event.effectiveDirective);
          document.addEventListener("securitypolicyviolation", stopped);
          const image = document.createElement("img");
          image.src = "https://example.org/x.png";
          document.body.append(image);
          const style = document.createElement("style");
          style.textContent = "body { display: none }";
          document.body.append(style);
          try { document.body.innerHTML = "<b>markup</b>"; } catch { window.refused = true; }
        }"""
    )
    until(tab, "window.stopped.includes('img-src') && window.stopped.includes('style-src-elem') && window.refused")
    assert not tab.evaluate("fetch('https://example.org').then(() => true, () => false)")
    context.close()


def test_names_that_turn_the_direction_of_text_leave_the_numbers_alone(tmp_path: Path) -> None:
    turned = "\u202ecat\u2069\u2066"
    page = write_report(review_of(60, (turned, "dog", "f" * 30)), tmp_path).read_text()
    shown = re.findall(r'<text x="(?:126|434)"[^>]*>(.*?) <tspan class="dim">(\d+)</tspan>', page)
    assert [name for name, _ in shown] == ["\u2068\u202ecat\u2069", "\u2068dog\u2069", f"\u2068{'f' * 15}…\u2069"]
    assert page.count("\u2068\u202ecat\u2069 →") == 2


# ---- what a finished run keeps for the page ----


def test_evidence_is_read_back_and_gives_the_same_page(tmp_path: Path) -> None:
    found = unreadable((["a.png", "b.png"], {1: "image: cut off"}), ([], {}))
    for review in (
        showing(thoughtful(review_of()), findings=found),
        showing(review_of(), quality=None, threshold=[0.5, float("nan")], sweep=(), odds=np.full(120, np.nan)),
    ):
        write_evidence(tmp_path / "evidence.json", review.evidence)
        again = replace(review, evidence=read_evidence(tmp_path / "evidence.json"))
        assert again.evidence.synthetic_ids == review.evidence.synthetic_ids
        page = write_report(review, tmp_path / "a").read_bytes()
        assert page == write_report(again, tmp_path / "b").read_bytes()
        assert (b"<td><bdi>b.png</bdi></td><td><bdi>image: cut off</bdi></td>" in page) == bool(
            review.evidence.findings
        )


def test_a_page_shows_all_proposals_and_of_every_class_the_most_suspicious_kept_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("synth_refine.review.evidence.KEPT_ROWS", 30)
    monkeypatch.setattr("synth_refine.review.evidence.KEPT_OF_CLASS", 1)
    artifact = review_of().artifact
    random = np.random.default_rng(0)
    posterior = random.dirichlet(np.ones(3), 119)  # of all rows but the last
    numbers = random.permutation(119)
    known = shown_rows(
        artifact, artifact.labels, lambda: [(numbers[:50], posterior[:50]), (numbers[50:], posterior[50:])]
    )
    rows, actions = known["rows"], artifact.action[known["rows"]]
    assert actions.tolist() == ["change"] * 40 + ["abstain"] * 8 + ["keep"] * 30
    probs = dict(zip(numbers.tolist(), posterior, strict=True))
    for row, other, odds in zip(rows.tolist(), known["probable"].tolist(), known["odds"].tolist(), strict=True):
        if row != 119:
            rest = np.where(np.arange(3) == artifact.given[row], 0, probs[row])
            assert other == rest.argmax()
            assert odds == pytest.approx(rest.max() / probs[row][artifact.given[row]])
    kept = rows[48:]
    assert (np.diff(known["odds"][48:]) <= 0).all()
    assert np.bincount(artifact.given[kept], minlength=3).tolist() == [0, 15, 15]  # cats are all changed
    left = np.setdiff1d(np.flatnonzero(artifact.action == "keep"), [*kept, 119])
    ratio = {row: known["odds"][place] for place, row in enumerate(rows.tolist())}
    for row in left.tolist():
        rest = np.where(np.arange(3) == artifact.given[row], 0, probs[row])
        own = [ratio[one] for one in kept.tolist() if artifact.given[one] == artifact.given[row]]
        assert rest.max() / probs[row][artifact.given[row]] <= min(own)


@pytest.mark.parametrize("damage", ["", "[]", "{}", "[" * 100_000, '{"rows": [1e400]}', "<html>"])
def test_damaged_evidence_is_one_line(damage: str, tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_text(damage)
    with pytest.raises(InputError, match="evidence: expected what a run wrote, but .* is damaged") as caught:
        read_evidence(tmp_path / "evidence.json")
    assert "\n" not in str(caught.value)


def test_nearest_synthetic_images_are_found_in_chunks_as_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synth_refine.review.evidence.REAL_ROWS", 7)
    monkeypatch.setattr("synth_refine.review.evidence.SYNTHETIC_ROWS", 4)
    random = np.random.default_rng(0)
    features, synthetic = random.standard_normal((50, 6)), random.standard_normal((33, 6)) + 1
    features[4] = np.nan
    rows = np.array([9, 4, *range(10, 40)])
    found = nearest_synthetic(features, rows, synthetic, k=5)
    for row, near in zip(rows, found, strict=True):
        left, right = features[row] - np.nanmean(features, axis=0), synthetic - synthetic.mean(axis=0)
        cosine = right @ left / np.linalg.norm(right, axis=1)
        assert near.tolist() == ([-1] * 5 if row == 4 else np.argsort(-cosine)[:5].tolist())
    assert nearest_synthetic(features, rows, synthetic[:2], k=5).shape == (32, 2)


# ---- many images, small screens, the dark ----


def test_5000_changes_stay_light(visit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synth_refine.review.report.EMBEDDED_BYTES", 100)
    review = review_of(15_000, tuple(f"class {number}" for number in range(100)))
    blue = Image.new("RGB", (8, 8), "blue")
    page = write_report(replace(review, image=lambda row: picture(row, 2), synthetic_image=lambda row: blue), tmp_path)
    assert len(changed(review)) == 5000
    assert page.stat().st_size < 3_000_000
    assert len(list((tmp_path / "thumbnails").iterdir())) > 4000
    fetched = []
    tab = visit(page)
    tab.on("request", lambda request: fetched.append(request.url))
    elements = "document.getElementsByTagName('*').length"
    assert tab.evaluate(elements) < 5000
    assert "of 105" in tab.locator("#page").inner_text()
    tab.click("#bulk-accept")
    assert "5,000 accepted" in tally(tab)
    tab.click("#next")
    tab.select_option("#state", "accept")
    tab.select_option("#old", label="class 3")
    assert tab.locator(".card").count() == 48
    assert tab.evaluate(elements) < 5000
    assert len(fetched) < 48 * 4 * 4
    until(tab, "document.querySelector('.card img').naturalWidth > 0")
    tab.reload()
    assert "5,000 accepted" in tally(tab)


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 360), ("light", 1280)])
def test_long_names_need_no_sideways_scrolling(
    scheme: str, width: int, visit: Callable[..., Any], tmp_path: Path
) -> None:
    names = ("c" * 400, "a class with many words in its long name", "f", *(letter * 200 for letter in "ghijk"))
    tab = visit(
        write_report(thoughtful(review_of(60, names, prefix="folder/" * 10)), tmp_path, title="t" * 100),
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
    )
    tab.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """(most) => [...document.querySelectorAll('body *')].filter(
        (one) => one.getBoundingClientRect().right > most && !one.closest('.scroll, .near, .hidden, .skip, svg')
      ).map((one) => one.outerHTML.slice(0, 80))"""
    assert tab.evaluate(beyond, width + 1) == []
    if width < 600:  # the way to the review is on the first screen
        link = tab.locator("header a[href='#review']")
        assert link.bounding_box()["y"] < 500
        link.click()
        assert tab.evaluate("document.activeElement.className") == "card"
        tab.locator(".card .picture").first.click()
        assert tab.locator("#full").bounding_box()["width"] <= width
        tab.click("#full-close")
    tab.locator(".card .accept").first.click()
    assert "1 accepted" in tally(tab)


def test_dark_and_light_by_system_and_by_switch(small: Path, visit: Callable[..., Any]) -> None:
    tab = visit(small, color_scheme="dark")

    def brightness(element: str, of: str) -> float:
        # A canvas turns whatever notation the browser uses for colours into bytes.
        script = f"""() => {{
          const pen = document.createElement("canvas").getContext("2d");
          pen.fillStyle = getComputedStyle(document.querySelector("{element}")).{of};
          pen.fillRect(0, 0, 1, 1);
          return pen.getImageData(0, 0, 1, 1).data.slice(0, 3).reduce((sum, one) => sum + one, 0) / 765;
        }}"""
        return float(tab.evaluate(script))

    def is_dark() -> bool:
        back, text = brightness("html", "backgroundColor"), brightness(".card .labels", "color")
        assert abs(back - text) > 0.6
        return back < 0.3

    assert is_dark()
    tab.emulate_media(color_scheme="light")
    assert not is_dark()
    tab.select_option("#theme", "dark")
    assert is_dark()
    tab.reload()
    assert is_dark()
    tab.select_option("#theme", "")
    assert not is_dark()


# ---- files ----


def test_the_same_review_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synth_refine.review.report.EMBEDDED_BYTES", 100)  # thumbnails go beside the page
    write_report(review_of(), tmp_path / "a")
    write_report(review_of(90), tmp_path / "b")
    write_report(review_of(), tmp_path / "b")  # thumbnails of the page before go

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) > 40
    monkeypatch.undo()
    write_report(review_of(), tmp_path / "b")
    assert list(files(tmp_path / "b")) == ["report.html"]


def test_killed_before_the_end_the_old_page_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synth_refine.review.report.EMBEDDED_BYTES", 100)
    page = write_report(review_of(), tmp_path)
    before = page.read_bytes()
    pictures = set((tmp_path / "thumbnails").iterdir())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("synth_refine.review.report._Pictures.remove_others", stop)
    monkeypatch.setattr("synth_refine.review.report._flows", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(review_of(90, prefix="other/"), tmp_path)
    assert page.read_bytes() == before
    assert pictures <= set((tmp_path / "thumbnails").iterdir())


def test_a_picture_that_cannot_be_read_is_said_and_no_camera_notes_get_in(
    visit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synth_refine.review.report.EMBEDDED_BYTES", 100)
    review = review_of(30)
    bad = changed(review)[0]

    def image(row: int) -> Image.Image:
        if row == bad:
            raise InputError("image: expected an image, got an HTML page")
        large = picture(row, 700)
        large.info |= dict.fromkeys(("exif", "icc_profile", "xmp", "comment"), b"Exif\0\0secret place")
        return large

    page = write_report(replace(review, image=image), tmp_path)
    assert not [path for path in (tmp_path / "thumbnails").iterdir() if b"secret" in path.read_bytes()]
    tab = visit(page)
    assert tab.locator("div.picture").inner_text() == "image: expected an image, got an HTML page"
    tab.locator("img.picture").first.scroll_into_view_if_needed()
    until(tab, "document.querySelector('img.picture').naturalWidth > 0")
    assert tab.evaluate("document.querySelector('img.picture').naturalWidth") == ALONE_SIDE


def test_nothing_to_review(visit: Callable[..., Any], tmp_path: Path) -> None:
    review = review_of(30)
    artifact = review.artifact
    calm = replace(showing(review, sweep=(), quality=None), artifact=record(artifact.given, artifact.given))
    tab = visit(write_report(calm, tmp_path))
    assert tab.locator(".card").count() == 0
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#export").is_disabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("cat", "cat", "frog")}, "classes: expected every id once"),
        ({"names": ("cat", "dog")}, "classes: expected 3 names, got 2"),
        ({"rows": np.arange(1, 121)}, "rows: expected classes 0 to 119, got 120"),
        ({"nearest": np.full((120, 1), 30)}, "nearest: expected numbers from -1 to 29, got 30"),
        ({"nearest": np.full((3, 1), 0)}, r"nearest: expected shape \(120, K\), got \(3, 1\)"),
        (
            {"quality": taken_from(Quality, prototype_quality(np.eye(3), np.arange(3)))},
            r"quality: expected shape \(30,\)",
        ),
    ],
)
def test_reviews_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_report(replace(review_of(), **change) if "names" in change else showing(review_of(), **change), tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- decisions ----


def test_from_the_page_to_label_files_and_back(
    visit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    review = hostile()
    artifact = review.artifact
    write_artifact("refined", review.artifact)
    shuffled = np.random.default_rng(1).permutation(60)
    write_labels("given.csv", artifact.given[shuffled], [artifact.ids[row] for row in shuffled])
    tab = visit(write_report(review, tmp_path / "page"))
    rows = [row for row in changed(review) if (artifact.given[row], artifact.labels[row]) == (0, 1)]
    tab.select_option("#old", "0")
    tab.select_option("#new", "1")
    tab.click("#bulk-accept")
    tab.select_option("#sort", "row")
    tab.locator(".card .reject").first.click()
    tab.locator(".card .correct").last.click()
    tab.select_option("#class", "3")
    tab.click("#correct-take")
    tab.select_option("#kind", "1")
    tab.click("#reset")
    tab.locator(".card .correct").first.click()
    tab.select_option("#class", "2")
    tab.click("#correct-take")
    export(tab, tmp_path / "decisions.csv")

    write_artifact("reviewed", reviewed(read_artifact("refined"), "decisions.csv"))
    assert cli.main(["apply", "reviewed", "--given", "given.csv", "--out", "new.csv"]) == 0
    labels, ids = read_labels_and_ids("new.csv")
    assert ids is not None
    expected = artifact.given.copy()
    expected[rows[1:-1]] = 1
    expected[rows[-1]] = 3
    expected[np.flatnonzero(artifact.action == "abstain")[0]] = 2
    assert dict(zip(ids, labels.tolist(), strict=True)) == dict(zip(artifact.ids, expected.tolist(), strict=True))
    assert (expected != artifact.given).any()
    assert (expected != artifact.labels).any()
    assert cli.main(["revert", "reviewed", "--labels", "new.csv", "--out", "back.csv"]) == 0
    assert Path("back.csv").read_bytes() == Path("given.csv").read_bytes()


def decisions(path: Path, *rows: tuple[str, str, str, str]) -> Path:
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 4
    path.write_bytes(csv_bytes(dict(zip(("id", "given", "decision", "label"), columns, strict=True))))
    return path


def test_what_nobody_decided_on_stays_and_is_marked(tmp_path: Path) -> None:
    artifact = record(
        np.array([0, 1, 2, 0]), np.array([1, 1, 0, 2]), num_classes=3, confidence=np.full(4, 0.9), reason="x"
    )
    file = decisions(
        tmp_path / "d.csv", ("0", "0", "accept", "1"), ("2", "2", "reject", "2"), ("1", "1", "correct", "0")
    )
    result = reviewed(artifact, file)
    assert result.labels.tolist() == [1, 0, 2, 0]
    assert result.action.tolist() == ["change", "change", "keep", "abstain"]
    assert result.reason.tolist() == ["x", "corrected by hand", "", "x"]
    assert result.run["reviewed"] == {"artifact": artifact.hash, "decisions": file_hash(file)}
    assert artifact.labels.tolist() == [1, 1, 0, 2]
    write_artifact(tmp_path / "result", result)
    assert read_artifact(tmp_path / "result").labels.tolist() == [1, 0, 2, 0]
    assert read_artifact(tmp_path / "result").revert(result.labels).tolist() == [0, 1, 2, 0]
    again = decisions(tmp_path / "again.csv", ("0", "0", "reject", "0"))
    assert reviewed(result, again).run["reviewed"]["artifact"] == result.hash != artifact.hash
    assert reviewed(artifact, decisions(tmp_path / "none.csv")).labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (("9", "0", "accept", "1"), WrongIds, "expected ids of the artifact, got '9'"),
        (("0", "0", "maybe", "1"), InputError, "expected accept, reject, correct or remove for '0', got 'maybe'"),
        (("0", "0", "accept", "cat"), InputError, "expected class names for '0', got 'cat'"),
        (("0", "1", "accept", "1"), WrongBase, "about another refinement"),
        (("0", "0", "accept", "2"), WrongBase, "expected accept of '1' for '0'"),
        (("0", "0", "reject", "1"), WrongBase, "expected reject of '0' for '0'"),
    ],
)
def test_decisions_about_something_else_are_refused(
    row: tuple[str, str, str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    artifact = record(np.array([0, 1, 2]), np.array([1, 1, 0]), num_classes=3)
    with pytest.raises(error, match=message):
        reviewed(artifact, decisions(tmp_path / "d.csv", row))


def test_tables_that_are_no_decisions_are_refused(tmp_path: Path) -> None:
    artifact = record(np.array([0, 1]), np.array([1, 1]))
    with pytest.raises(InputError, match="expected every id once"):
        reviewed(artifact, decisions(tmp_path / "d.csv", *[("0", "0", "accept", "1")] * 2))
    (tmp_path / "d.csv").write_text("id,label\n0,1\n")
    with pytest.raises(InputError, match="got no given"):
        reviewed(artifact, tmp_path / "d.csv")
    with pytest.raises(InputError, match="classes: expected 2 names, got 1"):
        reviewed(artifact, decisions(tmp_path / "d.csv"), ["cat"])
