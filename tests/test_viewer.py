"""rollouts.jsonl and its page: numbers against the equations and the run's log; the page in a real
browser.

Numbers are recorded to three significant digits: half a unit of the third is at most 0.5 %.
"""

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import REPOSITORY
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

import grpo
import rec_oneside_nois
import red_weight
from common import recording, viewer
from common.errors import BadInput
from common.metrics import StepMetrics
from common.models import TINY_MODEL, load_tokenizer
from common.runlog import RunLog
from common.sampling import Batch
from tests.helpers import command, dense_task, metrics, resume, rollouts, run_module, train

ROUNDED = 0.00501
TEMPLATE = (REPOSITORY / "common" / "viewer.html").read_text(encoding="utf-8")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = (
    "</script><script>document.title = 'hacked'</script>"
    "<img src=x onerror=\"document.title='hacked'\"> &amp; \u2028"
)
CHARACTERS = "naïve 🙂👩‍👩‍👧 日本 שלום עולם مرحبا \ud7ff\n\ttab  two spaces"


def groups_of(run_dir):
    return [record for record in rollouts(run_dir) if "responses" in record]


# The record


@pytest.fixture(scope="module")
def tokenizer():
    # byte-level: most characters outside ASCII are several tokens
    return load_tokenizer(TINY_MODEL)


@pytest.mark.parametrize("text", [CHARACTERS, HOSTILE, "", "plain 12+3"])
def test_texts_of_tokens_join_to_the_response(text, tokenizer):
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    texts = recording.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    assert texts[-1] == tokenizer.decode([tokenizer.eos_token_id]) and not any(
        "\ufffd" in text for text in texts
    )


def test_a_character_that_was_cut_off_is_the_last_tokens(tokenizer):
    ids = tokenizer("a🙂")["input_ids"]
    assert len(ids) > 3
    texts = recording.token_texts(tokenizer, ids[:-1])
    assert texts[0] == "a" and set(texts[1:-1]) == {""} and set(texts[-1]) == {"\ufffd"}


def test_texts_of_a_tokenizer_that_keeps_spaces_in_front_of_words():
    # As Llama's: "▁" is a space, the first one is not shown, and what the vocabulary lacks is
    # bytes.
    words = ["▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in "🙂".encode()), "<unk>"]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    texts = recording.token_texts(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 1, 2, 0, 3, 4, 5, 6, 1]
    )
    assert texts == ["the", " cat", "s", " the", "", "", "", "🙂", " cat"]


# Log-probs of two groups of two responses, under policy, sampler and reference; the third group's
# rewards are equal.
LP = [[-1.0, -2.0, -0.5], [-0.7, -1.5], [-3.0], [-0.2, -0.4]]
SAMPLER = [[-1.5, -2.0, -0.4], [-0.3, -1.6], [-2.5], [-0.2, -0.5]]
REFERENCE = [[-1.1, -1.0, -0.5], [-0.9, -1.4], [-3.5], [-0.3, -0.1]]
REWARDS = [[1.0, 0.0], [0.5, 0.5]]
TRUTHS = {  # d loss / d log π · −N, from each script's equation
    grpo: lambda a, rho: 0.0 if (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8) else rho * a,
    rec_oneside_nois: lambda a, rho: 0.0 if (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8) else a,
    red_weight: lambda a, rho: math.exp(a) * a,
}


def recorded(script, tokenizer, budget=10, reference=True, rows=range(4)):
    """What a script's `gradient` records of the four responses above; the metrics, too.

    With a budget of 10 tokens, a micro-batch is a group; with 1, it is a single response.
    """
    batch = Batch(
        number=2,
        version=0,
        group_size=2,
        problems=[0, 0, 1, 1],
        prompts=[[5, 6]] * 4,
        responses=[[7] * len(lp) for lp in LP],
        logprobs=SAMPLER,
        truncated=[False, True, False, False],
        metrics={"time/sample": 1.0},
        grades=[{"reward": reward} for group in REWARDS for reward in group],
    )
    args = script.Args(max_tokens_per_microbatch=budget)
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    policy = SimpleNamespace(parameters=lambda: [], device=torch.device("cpu"))
    step = StepMetrics(rows)
    step.times["time/train"] = 1.0

    def token_logprobs(model, micro, temperature, precision):
        def in_place(values):
            filled = torch.zeros(micro.mask_BT.shape)
            ours = [value for row in micro.rows for value in values[row]]
            filled[micro.mask_BT] = torch.tensor(ours)
            return filled

        lp_BT = in_place(LP if model is policy else REFERENCE)
        entropy_BT = in_place([[-value for value in lp] for lp in LP])
        return lp_BT.requires_grad_(torch.is_grad_enabled()), entropy_BT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "token_logprobs", token_logprobs)
        other = "the initial policy" if reference else None
        script.gradient(batch, policy, other, args, "float32", step)
    result = step.result(batch, policy.device, "float32")
    problems = [{"prompt": "one", "answer": 7}, {"prompt": [{"role": "user", "content": "two"}]}]
    problem_set = SimpleNamespace(problems=problems, tokenizer=tokenizer)
    records = recording.group_records(5, batch, step.recorded_tokens(), problem_set)
    return json.loads(json.dumps(list(records), allow_nan=False)), result


@pytest.mark.parametrize("budget", [10, 1])
@pytest.mark.parametrize("script", TRUTHS)
def test_the_record_is_what_the_equations_say(script, budget, tokenizer):
    groups, _ = recorded(script, tokenizer, budget)
    assert [(g["step"], g["prompt"], g["answer"]) for g in groups] == [
        (5, "one", "7"), (5, [{"role": "user", "content": "two"}], None),
    ]  # fmt: skip
    responses = [response for group in groups for response in group["responses"]]
    assert [r["reward"] for r in responses] == [1.0, 0.0, 0.5, 0.5]
    assert [r["truncated"] for r in responses] == [False, True, False, False]
    sizes = (1.0, -1.0) if script is grpo else (0.5, -0.5)
    for response, lp, sampler, ref, a in zip(
        responses, LP, SAMPLER, REFERENCE, (*sizes, 0.0, 0.0), strict=True
    ):
        assert response["length"] == len(response["tokens"]) == len(lp)
        assert response["advantage"] == pytest.approx(a, rel=ROUNDED) and response["logprob"] == lp
        rho = [math.exp(new - old) for new, old in zip(lp, sampler, strict=True)]
        assert response["ratio"] == pytest.approx(rho, rel=ROUNDED)
        difference = [new - old for new, old in zip(lp, ref, strict=True)]
        assert response["to_reference"] == pytest.approx(difference, rel=ROUNDED, abs=1e-6)
        assert response["entropy"] == [-value for value in lp]
        truth = [TRUTHS[script](a, one) for one in rho] if a else None
        assert response["push"] == (truth and pytest.approx(truth, rel=ROUNDED, abs=1e-12))


def test_a_tokens_weight_in_the_loss_does_not_change_its_push(tokenizer, monkeypatch):
    # As where every response weighs the same, however many tokens it has.
    def token_weights(advantages_PG, lengths_PG, args):
        return (advantages_PG != 0) / (lengths_PG * lengths_PG.numel())

    expected, _ = recorded(grpo, tokenizer)
    monkeypatch.setattr(grpo, "token_weights", token_weights)
    assert recorded(grpo, tokenizer)[0] == expected


def test_without_a_reference_and_cut_to_the_bound(tokenizer, monkeypatch):
    monkeypatch.setattr(recording, "MOST_TOKENS", 8)  # 2 for each of the 4
    groups, result = recorded(grpo, tokenizer, reference=False)
    assert "kl/ref_k2" not in result
    first = groups[0]["responses"][0]
    assert "to_reference" not in first and first["length"] == 3
    assert first["logprob"] == LP[0][:2] and len(first["push"]) == len(first["tokens"]) == 2
    (only,), _ = recorded(grpo, tokenizer, rows=range(2))
    assert len(only["responses"]) == 2
    assert recorded(grpo, tokenizer, rows=range(0))[0] == []


def test_numbers_that_json_does_not_know_become_null(tokenizer, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LP", [[-1.0, -math.inf, math.nan], *LP[1:]])
    groups, _ = recorded(grpo, tokenizer)
    assert groups[0]["responses"][0]["logprob"] == [-1.0, None, None]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run all of whose groups are recorded at every step, with batches that are up to two updates
    old.
    """
    place = tmp_path_factory.mktemp("viewer")
    settings = {
        "num_steps": 6,
        "prompts_per_step": 2,
        "rollouts_interval": 1,
        "eval_interval": 2,
        "sync_interval": 3,
    }
    return train(place, "one", task=dense_task(place), learning_rate=3e-3, **settings)


def test_averages_of_the_record_are_the_metrics(run_dir):
    groups, clipped_ever = groups_of(run_dir), 0
    for record in metrics(run_dir)[1:]:
        responses = [
            r for group in groups if group["step"] == record["step"] for r in group["responses"]
        ]
        assert len(responses) == 8

        def tokens(name, responses=responses):
            return [value for response in responses for value in response[name] or []]

        count = sum(response["length"] for response in responses)
        clipped = sum(value == 0 for value in tokens("push"))
        clipped_ever += clipped
        truth = {
            "reward/mean": sum(r["reward"] for r in responses) / 8,
            "response_length/mean": count / 8,
            "response_length/truncated": sum(r["truncated"] for r in responses) / 8,
            "entropy": sum(tokens("entropy")) / count,
            "kl/ref_k2": sum(value**2 / 2 for value in tokens("to_reference")) / count,
            "ratio/max": max(tokens("ratio")),
            "ratio/clip_fraction": clipped / count,
        }
        assert {key: record[key] for key in truth} == pytest.approx(truth, rel=0.01, abs=1e-9)
        assert record["ratio/clip_fraction"] * count == pytest.approx(clipped, abs=1e-6)
    assert clipped_ever > 5  # else the test says little


def test_completions_and_record_say_the_same(run_dir):
    completions = [
        json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()
    ]
    found = {
        (g["step"], g["prompt"], "".join(r["tokens"]).removesuffix("<|end|>")): r
        for g in groups_of(run_dir)
        for r in g["responses"]
    }
    for completion in completions:
        response = found[completion["step"], completion["prompt"], completion["response"]]
        assert (
            completion["tokens"] == response["length"]
            and completion["truncated"] == response["truncated"]
        )
        assert completion["advantage"] == pytest.approx(response["advantage"], rel=ROUNDED)


def test_greedy_answers_of_each_evaluation_are_recorded(run_dir):
    greedy = [record for record in rollouts(run_dir) if "greedy" in record]
    assert [record["step"] for record in greedy] == [
        step for step in (0, 2, 4, 6) for _ in range(4)
    ]
    for record in metrics(run_dir):
        rewards = [answer["reward"] for answer in greedy if answer["step"] == record["step"]]
        if rewards:
            assert sum(rewards) / 4 == pytest.approx(record["eval/reward"], rel=ROUNDED)


def test_it_can_be_switched_off_and_on_again(tmp_path):
    run = train(tmp_path, rollouts_interval=0)
    assert not list(run.glob("rollouts*"))
    with pytest.raises(BadInput, match="--rollouts-interval above 0"):
        viewer.page([run])
    assert command(*resume(run, "--num-steps", 4, "--rollouts-interval", 2)) == 0
    assert {record["step"] for record in rollouts(run)} == {4} and (run / "rollouts.html").exists()
    assert command(*resume(run, "--num-steps", 6, "--rollouts-interval", 0)) == 0
    assert {record["step"] for record in rollouts(run)} == {4}


def test_the_default_records_two_groups_of_the_first_and_every_tenth_step(tmp_path):
    log = RunLog(grpo.__file__, grpo.Args(output=str(tmp_path)))
    assert [step for step in range(1, 31) if log.recorded_rows(step)] == [1, 10, 20, 30]
    assert log.recorded_rows(10) == range(16)


def test_a_page_that_cannot_be_written_does_not_hide_the_error(tmp_path, capsys):
    log = RunLog(grpo.__file__, grpo.Args(output=str(tmp_path), name="run"))
    with pytest.raises(KeyError, match="the run's own"), log:
        log.write(0, {})
        (tmp_path / "run" / "rollouts.html").mkdir()
        raise KeyError("the run's own")
    assert "has no new curves.png, rollouts.html or model/README.md" in capsys.readouterr().err


# The command


view = functools.partial(run_module, "common.viewer")


def data_of(path):
    """The data of a page, read as a browser does: up to the first end of the element."""
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)[1]
    )


def test_the_command_writes_one_run_or_two(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    (other / "rollouts.html").unlink()
    with (
        open(other / "metrics.jsonl", "a") as metrics_file,
        open(other / "rollouts.jsonl", "a") as rollouts_file,
    ):
        metrics_file.write('{"step": 7, "rewa')  # the run is writing this line
        rollouts_file.write('{"step": 7')
    assert view(other).returncode == 0
    (run,) = data_of(other / "rollouts.html")
    assert run["steps"] == [0, 1, 2, 3, 4, 5, 6] and run["groups"] == groups_of(run_dir)
    assert view(other, run_dir).stdout == f"Open {other / 'rollouts_vs_one.html'} in a browser.\n"
    assert [run["name"] for run in data_of(other / "rollouts_vs_one.html")] == ["other", "one"]
    assert view(other, run_dir, "--output", tmp_path / "page.html").returncode == 0
    assert data_of(tmp_path / "page.html") == data_of(other / "rollouts_vs_one.html")


def test_the_command_says_what_is_wrong(run_dir, tmp_path):
    for argv in (
        [tmp_path],
        [run_dir, tmp_path / "none"],
        [run_dir] * 3,
        [run_dir, "--output", tmp_path / "no" / "p"],
    ):
        result = view(*argv)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("viewer.py: error: "), result.stderr
        # where to find more than two
        assert ("python -m common.compare" in line) == (argv == [run_dir] * 3)


def test_the_page_needs_nothing_else_and_tells_no_paths(run_dir, tmp_path):
    text = (run_dir / "rollouts.html").read_text(encoding="utf-8")
    assert not re.findall(
        r"(?:src|href)=|@import|url\(|fetch\(|innerHTML|outerHTML|document\.write", TEMPLATE
    )
    assert str(run_dir.parent) not in text
    (script,) = re.findall(r"^<script>\n(.*?)^</script>", TEMPLATE, re.DOTALL | re.MULTILINE)
    assert len(script.splitlines()) < 300


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    api = pytest.importorskip(
        "playwright.sync_api", reason="the page is not tested: pip install playwright"
    )
    if not CHROMIUM:
        pytest.skip("the page is not tested: there is no chromium on this machine")
    off = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*off, "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page; at the end, fails if its console had anything to say, or if it asked for
    another file.
    """
    said, pages = [], []

    def open_it(path, address="", **context):
        page = browser.new_context(**context).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        url = Path(path).as_uri()
        page.on("request", lambda request: request.url == url or said.append(request.url))
        page.goto(url + address)
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.context.close()
    assert not said


def go_to(page, step):
    page.locator("#slider").fill(str([1, 2, 3, 4, 5, 6].index(step)))
    assert page.inner_text("#step") == str(step)


def read(text):
    """The number that the page shows as `text`."""
    return float(text.replace("−", "-"))


def tip(page):
    """What the box with a token's numbers says, by name."""
    names, values = (
        page.locator("#tip dt").all_inner_texts(),
        page.locator("#tip dd").all_inner_texts(),
    )
    return dict(zip(names, values, strict=True))


def test_the_page_shows_the_record(run_dir, open_page):
    page, seen = open_page(run_dir / "rollouts.html"), set()
    log = {record["step"]: record for record in metrics(run_dir)}
    for step in (1, 3, 6):
        go_to(page, step)
        groups = [group for group in groups_of(run_dir) if group["step"] == step]
        responses = [response for group in groups for response in group["responses"]]
        assert page.locator(".group pre").all_inner_texts()[:2] == [
            group["prompt"] for group in groups
        ]
        paragraphs = page.locator("#groups .tokens")
        texts = ["".join(response["tokens"]).replace("\n", "↵\n") for response in responses]
        assert [paragraph.text_content() for paragraph in paragraphs.all()] == texts
        heads = page.locator("#groups .response h3").all_inner_texts()
        for head, response in zip(heads, responses, strict=True):
            assert read(re.search(r"reward\s+(\S+)", head)[1]) == response["reward"]
            assert read(re.search(r"advantage\s+(\S+)", head)[1]) == response["advantage"]
            assert (
                f"{response['length']} tokens" in head
                and ("cut at the limit" in head) == response["truncated"]
            )
        for key in ("reward/mean", "entropy", "ratio/clip_fraction"):
            said = page.inner_text(f'#curves [data-key="{key}"] b')
            assert read(said) == pytest.approx(log[step][key], rel=ROUNDED)
        assert f"(lag {log[step]['lag']})" in page.inner_text("#facts")
        for number, response in enumerate(responses):
            for i in {0, len(response["tokens"]) // 2, len(response["tokens"]) - 1}:
                paragraphs.nth(number).locator(".t").nth(i).focus()
                found, push = tip(page), response["push"] and response["push"][i]
                names = {
                    "log π": "logprob",
                    "ρ, policy / sampler": "ratio",
                    "entropy (nats)": "entropy",
                }
                for name, key in {**names, "log π − log π_ref": "to_reference"}.items():
                    assert read(found[name]) == response[key][i]
                direction = (
                    "clipped" if push == 0 else "pushed up" if push and push > 0 else "pushed down"
                )
                verdict = "no gradient" if push is None else direction
                assert read(found[verdict]) == (push or 0)
                seen.add(verdict)
    assert {"pushed up", "pushed down"} <= seen


def test_who_wrote_what_in_several_turns(run_dir, open_page, tmp_path):
    run, records = shutil.copytree(run_dir, tmp_path / "told"), rollouts(run_dir)
    group = next(record for record in records if "responses" in record)
    response = group["responses"][1]
    told = [2 <= i < 5 or i == 7 for i in range(len(response["tokens"]))]
    response["told"] = told
    next(record for record in records if "greedy" in record)["greedy"] = ["44+28=", "72", " so 72."]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "rollouts.html").write_text(viewer.page([run]), encoding="utf-8")
    page = open_page(run / "rollouts.html")
    grey = "spans => spans.map(span => span.classList.contains('told'))"
    for lens in ("loss", "entropy"):
        page.select_option("#lens", lens)
        assert "written by the environment" in page.inner_text("#keys")
        assert page.locator("#groups .told").count() == sum(told) == 4
        paragraph = page.locator("#groups .tokens").nth(1)
        assert paragraph.locator(".t").evaluate_all(grey) == told
        heads = page.locator("#groups .response h3").all_inner_texts()
        assert ["4 of them replies" in head for head in heads][:3] == [False, True, False]
    page.locator("#groups .told").first.focus()
    assert tip(page) == {"written by": "the environment"}
    assert page.locator("#greedy .told").all_inner_texts() == ["72"]
    assert "44+28=72 so 72." in page.inner_text("#greedy")
    assert "environment" not in open_page(run_dir / "rollouts.html").inner_text("#keys")


def test_colours_sort_and_filter_change_what_is_shown(run_dir, open_page):
    page = open_page(run_dir / "rollouts.html")
    go_to(page, 6)
    responses = [
        r for group in groups_of(run_dir) if group["step"] == 6 for r in group["responses"]
    ]
    clipped = [sum(value == 0 for value in response["push"] or [1]) for response in responses]
    assert page.locator("#groups .t.clip").count() == sum(clipped) > 0
    backgrounds, legends = set(), set()
    for lens in ("loss", "ratio", "logprob", "reference", "entropy"):
        page.select_option("#lens", lens)
        computed = (
            "spans => spans.map(s => getComputedStyle(s))"
            ".map(style => style.backgroundColor + style.backgroundImage)"
        )
        backgrounds.add(tuple(page.locator("#groups .t").evaluate_all(computed)))
        legends.add(page.inner_text("#legend"))
    assert len(backgrounds) == len(legends) == 5

    def rewards():
        heads = page.locator("#groups .response h3").all_inner_texts()
        return [read(re.search(r"reward\s+(\S+)", head)[1]) for head in heads]

    as_sampled = [response["reward"] for response in responses]
    assert rewards() == as_sampled
    page.select_option("#sort", "best first")
    assert rewards() == sorted(as_sampled[:4], reverse=True) + sorted(as_sampled[4:], reverse=True)
    page.select_option("#sort", "worst first")
    assert rewards() == sorted(as_sampled[:4]) + sorted(as_sampled[4:])
    page.select_option("#filter", "with clipped tokens")
    assert len(rewards()) == sum(map(bool, clipped))
    page.select_option("#filter", "above their group's mean")
    assert len(rewards()) == sum(response["advantage"] > 0 for response in responses)
    page.select_option("#filter", "groups with equal rewards")
    assert len(rewards()) == sum(response["advantage"] == 0 for response in responses)


def test_it_works_with_a_keyboard(run_dir, open_page):
    page = open_page(run_dir / "rollouts.html")
    for _ in range(5):  # slider, three menus, the first response
        page.keyboard.press("Tab")
    first = groups_of(run_dir)[0]["responses"][0]
    for place, key in (
        (0, None),
        (1, "ArrowRight"),
        (2, "ArrowRight"),
        (1, "ArrowLeft"),
        (first["length"] - 1, "End"),
    ):
        if key:
            page.keyboard.press(key)
        assert f"token {place + 1} of {first['length']}" in page.inner_text("#tip")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Tab")
    assert page.locator(".tokens").nth(1).locator(".t:focus").count() == 1
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#step") == "2"


def test_the_address_says_what_is_shown(run_dir, open_page):
    page = open_page(run_dir / "rollouts.html", address="#step=4&lens=ratio&sort=worst+first")
    assert page.inner_text("#step") == "4" and page.input_value("#lens") == "ratio"
    page.select_option("#filter", "cut at the limit")
    assert page.url.endswith("#step=4&lens=ratio&sort=worst+first&filter=cut+at+the+limit")


def test_a_click_on_a_curve_goes_to_that_step(run_dir, open_page):
    page = open_page(run_dir / "rollouts.html")
    box = page.locator("#curves svg").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 4.1 / 6, box["y"] + 5)
    assert page.inner_text("#step") == "4"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_the_dark(scheme, run_dir, open_page):
    page = open_page(
        run_dir / "rollouts.html", viewport={"width": 360, "height": 740}, color_scheme=scheme
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#groups .t").first.click()
    assert page.locator("#tip").bounding_box()["width"] == 360
    text, ground = (
        page.evaluate(
            f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        for name in ("color", "backgroundColor")
    )
    assert (sum(text) > sum(ground)) == (scheme == "dark") and abs(sum(text) - sum(ground)) > 450


def test_two_runs_stand_side_by_side(run_dir, open_page, tmp_path):
    other = train(tmp_path, "two", script="red_weight", **settings_of(run_dir))
    assert view(run_dir, other).returncode == 0
    page = open_page(run_dir / "rollouts_vs_two.html")
    go_to(page, 3)
    lefts = [
        column.bounding_box()["x"]
        for column in page.locator(".group").first.locator(".runs > div").all()
    ]
    assert len(lefts) == 2 and lefts[0] < lefts[1]
    for number, run in enumerate((run_dir, other)):
        group = next(group for group in groups_of(run) if group["step"] == 3)
        column = page.locator(".group").first.locator(".runs > div").nth(number)
        texts = [paragraph.text_content() for paragraph in column.locator(".tokens").all()]
        assert texts == ["".join(r["tokens"]).replace("\n", "↵\n") for r in group["responses"]]
    # both runs had the same prompts, so each is shown once
    assert page.locator(".group pre").count() == 2 + 4
    assert page.locator("#curves path").count() == 2 * 8


def settings_of(run_dir):
    args = json.loads((run_dir / "args.json").read_text())
    return {
        name: args[name]
        for name in vars(red_weight.Args())
        if name in args and name not in ("output", "name")
    }


def test_whatever_a_model_writes_is_text(run_dir, open_page, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "<b>hostile")
    many = [HOSTILE, CHARACTERS, "", "\ud83d", "\0", *["word "] * 9_995]
    values = {
        name: [None, *[1.0] * 9_999]
        for name in ("logprob", "ratio", "to_reference", "entropy", "push")
    }
    response = {
        "length": 12_000,
        "truncated": True,
        "tokens": many,
        "reward": None,
        "advantage": 1.0,
        **values,
    }
    prompt = [
        {"role": "system", "content": HOSTILE},
        {"role": "user", "content": [{"type": "text", "text": CHARACTERS}]},
    ]
    group = {"step": 1, "prompt": prompt, "answer": HOSTILE, "responses": [response]}
    greedy = {"step": 0, "prompt": HOSTILE, "answer": None, "greedy": HOSTILE * 3, "reward": None}
    (run / "rollouts.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in (greedy, group))
    )
    assert view(run).returncode == 0
    page = open_page(run / "rollouts.html", viewport={"width": 390, "height": 844})
    page.wait_for_timeout(200)
    assert page.title() == "Rollouts of <b>hostile" and page.locator("img, b b").count() == 0
    tokens = page.locator("#groups .t")
    assert tokens.count() == 10_000
    assert tokens.nth(0).text_content() == HOSTILE and tokens.nth(
        1
    ).text_content() == CHARACTERS.replace("\n", "↵\n")
    assert "2000 tokens that were not recorded" in page.inner_text("#groups")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    started = page.evaluate("performance.now()")
    page.select_option("#lens", "entropy")
    assert page.locator("#groups .t.plain").count() == 9_999
    assert page.evaluate("performance.now()") - started < 5_000


def test_a_run_without_recorded_steps_says_so(run_dir, open_page, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "empty")
    (run / "rollouts.jsonl").write_text("")
    assert view(run).returncode == 0
    assert "No step has been recorded yet." in open_page(run / "rollouts.html").inner_text("main")


def test_two_runs_of_other_steps_and_prompts(run_dir, open_page, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "later")
    records = [
        {**record, "step": record["step"] + 1, "prompt": "another"} for record in rollouts(run_dir)
    ]
    (other / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert view(run_dir, other, "--output", tmp_path / "page.html").returncode == 0
    page = open_page(tmp_path / "page.html")
    assert page.inner_text("#groups").count("not recorded at this step") == 2
    page.locator("#slider").fill("1")
    assert page.locator("#groups pre").all_inner_texts()[1::2] == ["another", "another"]
