"""The page of a team's dialogues: what goes in, what is left out, and the page itself in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from browser import complaints, emulate, open_page, requests
from echelon.errors import EchelonError
from echelon.reports import dialogues
from echelon.reports.dialogues import write_dialogues

pytest_plugins = ("browser",)

Line = dict[str, Any]

# ---------------------------------------------------------------- run folders written by hand

SOURCE = (
    "The lighthouse stood at the end of a long spit of shingle. Keepers came by boat when the weather let them, and "
    "when it did not they lived on what was in the store: flour, salt fish, oil for the lamp."
)


def scene(update: int, kind: str, item: int, path: list[int], answers: list[Line], **prompts: str) -> Line:
    asked = {role: {"system": f"You are the {role}.", "text": text} for role, text in prompts.items()}
    return {"update": update, "kind": kind, "item": item, "path": path, "prompts": asked, "answers": answers}


def answer(
    reward: float, parts: dict[str, float] | None = None, /, feedback: str = "", error: str = "", **said: str
) -> Line:
    told: Line = {"said": said, "reward": reward, "parts": {"all": reward} if parts is None else parts}
    return told | ({"feedback": feedback} if feedback else {}) | ({"error": error} if error else {})


def write_run(folder: Path, lines: list[Line], *, updates: int = 0, metrics: list[Line] | None = None,
              evaluations: list[Line] | None = None, **config: str) -> Path:  # fmt: skip
    """A run's folder as the trainer leaves it, but for checkpoints and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"environment": '"writing"', "method": '"magrpo"', "model": '["smollm2-135m"]', "share": '"adapters"',
             "updates": str(updates or 4), "seed": "7", "eval_samples": "2"} | config  # fmt: skip
    tables = '\n[rollout]\ngroup = 4\nturns = 2\n\n[algorithm]\ndiscount = 0.5\njoint = "aligned"\n'
    (folder / "config.toml").write_text("".join(f"{k} = {v}\n" for k, v in plain.items()) + tables, encoding="utf-8")
    for name, content in (("dialogues", lines), ("metrics", metrics or []), ("evaluations", evaluations or [])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in content)
        )
    return folder


def small_run(folder: Path) -> Path:
    """Two updates and an evaluation; item 3 has two turns, four ways through, with the returns below."""
    ask = {"summary": "Summarise: " + SOURCE, "elaboration": "Tell more: " + SOURCE}
    lines = [
        scene(0, "eval", 9, [], [answer(0.5, summary="before 1", elaboration="before 2")], **ask),
        scene(1, "train", 3, [], [
            answer(1.0, {"length": 1.5, "overlap": -0.5}, feedback="Too long.", summary="one a", elaboration="two a"),
            answer(-1.0, {"length": 0.0, "overlap": -1.0}, summary="one b", elaboration="two b"),
        ], **ask),
        scene(1, "train", 3, [0], [
            answer(2.0, summary="better a", elaboration=""), answer(0.0, summary="better b", elaboration="   "),
        ], **ask),
        scene(1, "train", 3, [1], [
            answer(-2.0, summary="worse a", elaboration="x", error="reward function raised ValueError: no words"),
            answer(8.0, summary="worse b", elaboration="x"),
        ], **ask),
        scene(1, "train", 5, [], [answer(0.25, summary="five", elaboration="cinq")], **ask),
        scene(2, "train", 3, [], [answer(0.75, summary="later three", elaboration="l3")], **ask),
        scene(2, "train", 6, [], [answer(9.0, summary="later six", elaboration="l6")], **ask),
        scene(2, "eval", 9, [], [answer(0.5, summary="judged 1", elaboration="j")], **ask),
        scene(2, "eval", 9, [0], [answer(1.0, summary="judged 1, turn 2", elaboration="j")], **ask),
        scene(2, "eval", 9, [], [answer(0.75, summary="judged 2", elaboration="j")], **ask),
    ]  # fmt: skip
    metrics = [
        {"update": 1, "samples": 14, "tokens": 1234, "skipped": 0, "reward": 1.125, "errors": 1, "part_length": 0.75,
         "part_overlap": -0.5, "length_0": 11.0, "length_1": 80.5, "loss_0": 0.1},
        {"update": 2, "samples": 18, "tokens": 2345, "skipped": 0, "reward": 4.875, "errors": 0, "part_length": 1.5,
         "part_overlap": -0.25, "length_0": 12.0, "length_1": 90.0, "loss_0": 0.1},
    ]  # fmt: skip
    evaluations = [
        {"update": 0, "episodes": 8, "return": 0.5, "return_se": 0.1, "reward": 0.5},
        {"update": 2, "episodes": 8, "return": 0.875, "return_se": 0.125, "reward": 0.75},
    ]
    return write_run(folder, lines, metrics=metrics, evaluations=evaluations)


def payload(page: Path) -> dict[str, Any]:
    """What the page holds."""
    text = page.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])
    return found


# ---------------------------------------------------------------- what goes in


def test_a_folder_that_is_no_team_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EchelonError, match=r"nowhere is no run of a team .*: it has no config\.toml$"):
        write_dialogues(tmp_path / "nowhere")
    (tmp_path / "config.toml").write_text('method = "mappo"\n')
    with pytest.raises(EchelonError, match=r"its method is mappo$"):
        write_dialogues(tmp_path)
    (tmp_path / "config.toml").write_text("method = [\n")
    with pytest.raises(EchelonError, match="isn't TOML") as told:
        write_dialogues(tmp_path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "dialogues.html").exists()


def test_a_method_of_ones_own_is_shown_by_its_dialogues(tmp_path: Path) -> None:
    write_run(tmp_path, [], method='"my-own"')
    assert payload(write_dialogues(tmp_path))["title"] == "my-own on writing"


def test_the_curves_have_the_numbers_of_the_logs(tmp_path: Path) -> None:
    page = write_dialogues(small_run(tmp_path))
    assert page == tmp_path / "dialogues.html"
    data = payload(page)
    assert data["reward"] == [[1, 1.125], [2, 4.875]]
    # 8 episodes, 2 of an item: Student's t with 3 degrees of freedom, 3.18245, times the standard error.
    assert [row[:2] for row in data["evaluations"]] == [[0, 0.5], [2, 0.875]]
    assert [row[2] for row in data["evaluations"]] == pytest.approx([0.318245, 0.397806], abs=1e-5)
    assert {c["name"]: c["points"][-1][1] for c in data["parts"]} == {
        "length": 1.5, "overlap": -0.25, "tokens a reply, summary": 12, "tokens a reply, elaboration": 90,
        "answers without a score": 0,
    }  # fmt: skip
    assert dict(data["facts"])["updates"] == "2 of 4, not finished"


def test_a_long_curve_is_means_of_stretches(tmp_path: Path) -> None:
    metrics = [{"update": u, "reward": float(u % 2)} for u in range(1, 4001)]
    points = payload(write_dialogues(write_run(tmp_path, [], metrics=metrics)))["reward"]
    assert points[0] == [5.5, 0.5]
    assert len(points) == 400
    assert {y for _, y in points} == {0.5}


def test_texts_stand_in_the_page_once(tmp_path: Path) -> None:
    page = write_dialogues(small_run(tmp_path))
    assert page.read_text(encoding="utf-8").count("Summarise: ") == 1


def test_a_run_that_was_cut_off_in_a_line_is_shown_without_it(tmp_path: Path) -> None:
    small_run(tmp_path)
    file = tmp_path / "dialogues.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"update":3,"kind":"train","item":3,"pa')
    data = payload(write_dialogues(tmp_path))
    assert [(g["update"], g["kind"]) for g in data["groups"]] == [(0, "eval"), (1, "train"), (2, "eval"), (2, "train")]
    assert data["damaged"] == 0
    odd = [
        b"not JSON\n",
        b"[]\n",
        b'{"update":4,"kind":"train","item":1}\n',
        b'{"kind":"else","update":1}\n',
        b"\xff\n",
    ]
    file.write_bytes(
        whole + b"".join(odd) + b'{"item":4,"kind":"train","update":4,"path":[],"prompts":{},"answers":[]}\n'
    )
    data = payload(write_dialogues(tmp_path))
    assert data["damaged"] == 5
    assert data["updates"] == {"train": 3, "eval": 2}


def test_numbers_that_are_none_do_no_harm(tmp_path: Path) -> None:
    small_run(tmp_path)
    odd = '"item":1e999,"path":["x"],"prompts":{"a":3},"answers":[{"reward":NaN,"parts":{"p":1e999}}]'
    (tmp_path / "dialogues.jsonl").write_text('{"update":5,"kind":"train",' + odd + "}\n")
    (tmp_path / "metrics.jsonl").write_text('{"update":1,"reward":NaN}\n{"update":true,"reward":"high"}\n7\n')
    data = payload(write_dialogues(tmp_path))
    assert data["reward"] == []
    assert data["groups"][0]["episodes"][0][0]["answers"][0]["reward"] is None


def big_run(folder: Path, updates: int, characters: int) -> Path:
    def reply(update: int, item: int, j: int) -> str:
        return f"{update}/{item}/{j} ".ljust(characters, "x")

    lines = [
        scene(u, "train", i, [], [answer(float(j), writer=reply(u, i, j)) for j in range(4)], writer=SOURCE)
        for u in range(1, updates + 1) for i in range(4)
    ]  # fmt: skip
    return write_run(folder, lines, updates=updates)


def test_a_huge_run_keeps_the_newest_the_first_and_evenly_spaced_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogues, "_BUDGET", 200_000)
    page = write_dialogues(big_run(tmp_path, 100, 1000))
    data = payload(page)
    held = [group["update"] for group in data["groups"]]
    assert page.stat().st_size < 200_000 + 60_000  # the page itself has some 40 kB
    assert 9 <= len(held) <= 12  # 16 replies of 1000 characters each and what is around them
    assert (held[0], held[-1], data["updates"]["train"]) == (1, 100, 100)
    gaps = [b - a for a, b in pairwise(held)]
    assert max(gaps) <= 2 * 100 / len(held) + 1
    assert all(group["left"] == 0 and len(group["episodes"]) == 4 for group in data["groups"])


def test_an_update_larger_than_the_page_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "_BUDGET", 60_000)
    data = payload(write_dialogues(big_run(tmp_path, 3, 5000)))
    assert [(g["update"], g["left"], len(g["episodes"])) for g in data["groups"]] == [(3, 2, 2)]
    monkeypatch.setattr(dialogues, "_BUDGET", 15_000)  # not one whole scene fits: its texts are cut
    data = payload(write_dialogues(tmp_path))
    assert data["groups"][0]["episodes"]
    assert {"text": "3/0/0 ".ljust(2000, "x"), "of": 5000} in data["texts"]


@given(st.integers(0, 300))
@settings(max_examples=60)
def test_the_spread_is_an_order_of_all_that_is_dense_everywhere(count: int) -> None:
    order = list(dialogues._spread(count))
    assert sorted(order) == list(range(count))
    assert order[:2] == ([count - 1, 0][: min(count, 2)] if count else [])
    for n in range(2, count):
        some = sorted(order[:n])
        assert max(b - a for a, b in pairwise(some)) <= 2 * count / (n - 1) + 1


@given(st.text(), st.text(alphabet="<>/!-&script\u2028\u202e\x00\x1b\ud800"))
@settings(max_examples=50)
def test_no_text_ends_the_element_that_holds_it(tmp_path_factory: pytest.TempPathFactory, role: str, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    lines = [scene(1, "train", 0, [], [{"said": {role: text}, "reward": 1.0, "parts": {text: 1.0}}], **{role: text})]
    page = write_dialogues(write_run(folder, lines)).read_text(encoding="utf-8")
    assert page.count("</script") == 2
    assert "<!--" not in page.split('id="data">')[1]
    held = payload(folder / "dialogues.html")["texts"]
    assert not text or text in held


# ---------------------------------------------------------------- the page in a browser

browser_test = pytest.mark.usefixtures("browser")
Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any) -> Open:
    """Open the page of a run folder in a fresh state and wait until it is ready."""

    def opened(folder: Path, fragment: str = "") -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        open_page(browser, write_dialogues(folder), fragment)
        WebDriverWait(browser, 20).until(lambda d: d.execute_script("return document.body.dataset.ready") == "true")
        return browser

    return opened


def text(page: Any, element: str) -> str:
    return " ".join(page.find_element("id", element).text.split())


def click(page: Any, element: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).click()", element)


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def rows(page: Any) -> list[str]:
    return [" ".join(row.text.split()) for row in page.find_elements("css selector", "#list button")]


def current(page: Any) -> str:
    return " ".join(page.find_element("css selector", "#list [aria-current]").text.split())


def pick(page: Any, element: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", element)).select_by_value(value)


@browser_test
def test_the_page_shows_the_run_and_its_newest_update(show: Open, tmp_path: Path) -> None:
    page = show(small_run(tmp_path))
    assert text(page, "title") == "magrpo on writing"
    facts = text(page, "facts")
    assert "models smollm2-135m" in facts
    assert "seed 7" in facts
    assert "updates 2 of 4, not finished" in facts
    assert text(page, "reward-now") == "update 2: 4.875"
    assert text(page, "judged-now") == "update 2: 0.875 ± 0.398"
    assert text(page, "update-now") == "update 2 2 of 2"
    assert rows(page) == ["item 3 0.750", "item 6 9"]
    shown = text(page, "dialogue")
    assert "later three" in shown
    assert "Turn 1" in shown
    assert len(page.find_elements("css selector", ".agent")) == 2
    labels = [t.text for t in page.find_elements("css selector", "#reward-chart text")]
    assert {"update", "mean reward"} <= set(labels)
    assert len(page.find_elements("css selector", "#sparks section")) == 5
    assert complaints(page) == []
    assert [r for r in requests(page) if not r.startswith(("file:", "about:", "data:"))] == []


@browser_test
def test_choosing_leads_through_updates_items_and_joint_actions(show: Open, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(small_run(tmp_path))
    press(page, Keys.ARROW_LEFT)
    assert text(page, "update-now").startswith("update 1 ")
    # Returns with discount 0.5, by hand: 1 + 2/2, 1 + 0/2, -1 - 2/2, -1 + 8/2, and item 5's reward.
    assert rows(page) == [
        "item 3 · joint 1 › 1 2", "item 3 · joint 1 › 2 1", "item 3 · joint 2 › 1 −2 !", "item 3 · joint 2 › 2 3",
        "item 5 0.250",
    ]  # fmt: skip
    shown = text(page, "dialogue")
    assert all(word in shown for word in ("Turn 1 of 2", "one a", "two a", "Too long.", "Turn 2 of 2", "better a"))
    assert "an empty reply" in shown
    assert "place 2 of 5" in shown
    assert [" ".join(li.text.split()) for li in page.find_elements("css selector", ".scores li")][:2] == [
        "length 1.500", "overlap −0.500",
    ]  # fmt: skip
    press(page, Keys.ARROW_DOWN)
    assert "better b" in text(page, "dialogue")
    assert "only white space" in text(page, "dialogue")
    press(page, Keys.ARROW_DOWN)
    assert "Could not be scored: reward function raised ValueError: no words" in text(page, "dialogue")
    press(page, "b")
    assert current(page) == "item 3 · joint 2 › 2 3"
    press(page, "w")
    assert current(page) == "item 3 · joint 2 › 1 −2 !"
    pick(page, "order", "best")
    assert [row.split()[-1] for row in rows(page)] == ["3", "2", "1", "0.250", "!"]
    pick(page, "item", "5")
    assert rows(page) == ["item 5 0.250"]
    assert "cinq" in text(page, "dialogue")
    click(page, "best-of-all")
    assert current(page) == "item 6 9"
    assert text(page, "update-now").startswith("update 2 ")
    click(page, "worst-of-all")
    assert current(page).startswith("item 3 · joint 2 › 1")
    page.find_elements("css selector", ".joint button")[0].click()  # turn 1: the other joint action
    assert current(page) == "item 3 · joint 1 › 1 2"
    press(page, "e")
    assert text(page, "update-now").startswith("update 0 ")  # the evaluation nearest to update 1
    press(page, Keys.ARROW_RIGHT)
    assert rows(page) == ["item 9 · episode 1 1", "item 9 · episode 2 0.750"]
    assert "in the evaluation after update 2" in text(page, "dialogue")


@browser_test
def test_prompts_open_for_all_agents_and_stay_open(show: Open, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(small_run(tmp_path))
    assert "Summarise" not in text(page, "dialogue")
    press(page, "p")
    assert "You are the summary. user Summarise: The lighthouse" in text(page, "dialogue")
    press(page, Keys.ARROW_DOWN)
    assert "You are the elaboration." in text(page, "dialogue")


@browser_test
def test_a_curve_leads_to_the_update_that_is_clicked(show: Open, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = show(small_run(tmp_path))
    chart = page.find_element("css selector", "#judged-chart svg")
    ActionChains(page).move_to_element_with_offset(chart, -chart.size["width"] // 2 + 52, 0).click().perform()
    assert text(page, "judged-now").startswith("update 0: 0.500")
    assert text(page, "update-now").startswith("update 0 ")
    assert "before 1" in text(page, "dialogue")
    assert page.find_element("id", "eval").get_attribute("aria-pressed") == "true"


@browser_test
def test_a_link_leads_to_a_dialogue(show: Open, tmp_path: Path) -> None:
    page = show(small_run(tmp_path), "#kind=train&update=1&episode=1&path=2.2")
    assert current(page) == "item 3 · joint 2 › 2 3"
    assert page.execute_script("return location.hash") == "#kind=train&update=1&episode=1&path=2.2"
    page = show(tmp_path, "#kind=x&update=1e999&episode=-4&path=<b>")
    assert current(page) == "item 3 0.750"


@browser_test
def test_hostile_text_is_shown_and_never_run(show: Open, tmp_path: Path) -> None:
    attack = (
        "</script><script>window.hurt=1</script><img src=x onerror='window.hurt=2'>"
        "<!--<script>\u2028${alert(1)}&lt;\x00\x1b[31m\u202egnorw\u202c __DATA__ __SCRIPT_HASH__"
    )
    role = "</script><b>writer</b>"
    lines = [scene(1, "train", 0, [], [
        {"said": {role: attack}, "reward": 1.0, "parts": {attack: 1.0}, "feedback": attack, "error": attack},
    ], **{role: attack})]  # fmt: skip
    metrics = [{"update": 1, "reward": 1.0, f"part_{attack}": 1.0, "length_0": 3.0}]
    names = {"environment": '"<script>window.hurt=3</script>"', "model": '["<img src=x onerror=hurt()>"]'}
    folder = write_run(tmp_path, lines, metrics=metrics, **names)
    page = show(folder)
    press(page, "p")
    assert page.execute_script("return window.hurt") is None
    assert (
        page.execute_script("return document.querySelectorAll('main img, main script, main b b, header img').length")
        == 0
    )
    assert complaints(page) == []
    reply = page.find_element("css selector", ".reply").text
    assert reply.startswith("</script><script>window.hurt=1</script><img src=x")
    assert "␀␛[31m[U+202E]gnorw[U+202C] __DATA__ __SCRIPT_HASH__" in reply
    assert page.find_element("css selector", ".agent h3").text == role
    assert "<img src=x onerror=hurt()>" in text(page, "facts")
    assert page.title == "magrpo on <script>window.hurt=3</script>: dialogues"


@browser_test
def test_a_script_of_another_hand_would_not_run(show: Open, tmp_path: Path) -> None:
    page = show(small_run(tmp_path))
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hurt = 1'; document.body.append(s);"
        "const d = document.createElement('div'); document.body.append(d);"
        "d.innerHTML = '<img src=x onerror=\"window.hurt=2\">'"
    )
    assert page.execute_script("return window.hurt") is None
    assert any("Content Security Policy" in message for message in complaints(page))


@browser_test
def test_an_empty_run_and_a_run_without_evaluation(show: Open, tmp_path: Path) -> None:
    page = show(write_run(tmp_path / "new", []))
    shown = page.find_element("tag name", "body").text
    assert all(
        w in shown
        for w in ("Nothing has been said in this run yet.", "No update is done yet.", "There is no evaluation.")
    )
    assert not page.find_element("id", "choose").is_displayed()
    assert complaints(page) == []
    page = show(big_run(tmp_path / "train-only", 1, 20))
    assert page.find_element("id", "eval").get_attribute("disabled") == "true"
    assert rows(page)[:2] == ["item 0 · joint 1 0", "item 0 · joint 2 1"]
    assert complaints(page) == []


@browser_test
def test_long_replies_and_many_joint_actions_stay_inside_the_page(show: Open, tmp_path: Path) -> None:
    long = "word " * 20_000  # 100 kB
    many = [answer(float(j), a="x" * 3000 if j else long, b="\u0645\u0631\u062d\u0628\u0627 " * 50) for j in range(700)]
    more = [scene(u, "train", 0, [], [answer(0.0, a="y", b="z")], a=SOURCE, b=SOURCE) for u in range(1, 40)]
    page = show(write_run(tmp_path, [*more, scene(40, "train", 0, [], many, a="p" * 4000, b=long)]))
    try:
        for width in (1400, 420):
            emulate(page, width=width, height=900)
            press(page, "p", "p")
            wide = page.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wide == 0, f"the page scrolls sideways at {width}"
    finally:
        emulate(page)
    assert len(page.find_element("css selector", ".reply").text) == len(long)
    assert rows(page)[-1] == "show 300 more of 700"
    press(page, "b")
    assert current(page) == "item 0 · joint 700 699"
    assert len(page.find_elements("css selector", ".joint button")) == 300
    assert "and 400 more" in page.find_element("css selector", ".joint").text


@browser_test
def test_what_is_left_out_is_said_in_the_page(show: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "_BUDGET", 60_000)
    page = show(big_run(tmp_path, 30, 1000))
    held = int(text(page, "update-now").split()[-1])
    assert f"This page holds the dialogues of {held} of 30 updates" in text(page, "notes")
    monkeypatch.setattr(dialogues, "_BUDGET", 40_000)
    page = show(big_run(tmp_path, 2, 3000))
    assert text(page, "left-here") == "1 more joint histories of this update did not fit into the page."


@browser_test
def test_all_controls_have_names_and_colours_follow_the_system(show: Open, tmp_path: Path) -> None:
    page = show(small_run(tmp_path))
    nameless = """return [...document.querySelectorAll('button, input, select, nav, [role=group], svg')].filter(
        (e) => !(e.getAttribute('aria-label') || e.textContent.trim())).length"""
    assert page.execute_script(nameless) == 0
    back = "return getComputedStyle(document.body).backgroundColor"
    try:
        emulate(page, prefers_color_scheme="light")
        light = page.execute_script(back)
        emulate(page, prefers_color_scheme="dark")
        assert page.execute_script(back) != light
    finally:
        emulate(page)
