"""What the READMEs say is so: generated parts are fresh, commands and examples work, links exist,
words are plain.
"""

import re
import shlex

import pytest
import torch
import tyro

import grpo
import rec_oneside_nois
import red_weight
from common.models import TINY_MODEL, VLLM_VERSION, load_model, load_tokenizer
from common.sampling.transformers import TransformersSampler
from common.tasks import load_task
from tests import helpers
from tests.helpers import SMALL, as_options, steps, train
from tests.readme import DOCUMENTS, ROOT, refresh

SCRIPTS = {"grpo.py": grpo, "rec_oneside_nois.py": rec_oneside_nois, "red_weight.py": red_weight}
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
README = (ROOT / "README.md").read_text()
MOST_WORDS = 1800
# Words of a house dialect, and what to say instead.
NOT_PLAIN = {
    r"(?i)\bdr(aws?|ew|awn|awing)\b": "sample (a response), plot (a curve)",
    r"(?i)\b(a|one) sentence\b": "an error message",
    r"(?i)\bpro(ve[sdn]?|ving|ofs?)\b": "verify, check",
    r"\bleaves? behind\b": "writes, holds",
    r"\bpublished way\b": "agree with the published figure",
    r"follows from the machine": "depends on the machine",
    r"\bone text\b": "identical",
    r"\ba test keeps (them|it) so\b": "a test checks this",
    r"\bleaves free\b": "does not use",
    r"\bmend(s|ed|ing)?\b": "fix, correct",
}


def text(name):
    return (ROOT / name).read_text()


def bash(text):
    """All lines of the text's bash blocks, continued lines joined."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")


def prose(text):
    """The text without code, which may use any word."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("name", NAMES)
def test_generated_parts_are_fresh(name):
    assert refresh(ROOT / name) == text(name), "run `python -m tests.readme`"


@pytest.mark.parametrize("name", NAMES)
def test_no_line_begins_with_a_generated_number(name):
    # Markdown would end the paragraph before a comment
    assert not re.findall(r"^ *<!--=.*", text(name), re.MULTILINE)


def test_the_readme_is_short():
    # as `wc -w` counts: code blocks, tables and markers included
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("name", NAMES)
def test_the_words_are_plain(name):
    words = " ".join(prose(text(name)).split())
    found = [
        (words[m.start() - 30 : m.end() + 30], say)
        for p, say in NOT_PLAIN.items()
        for m in re.finditer(p, words)
    ]
    assert not found


def test_it_gives_the_two_commands():
    lines = bash(README).splitlines()
    assert "pip install -r requirements.txt && python grpo.py" in lines
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest" in lines


def test_ci_runs_the_commands_as_printed():
    fragments = re.findall(r"grep -m1 .*?'([^']+)' README.md", text(".ci/run"))
    assert len(fragments) == 2
    for fragment in fragments:
        # what .ci/run finds is the only one
        (line,) = (line for line in README.splitlines() if fragment in line)
        assert line in bash(README).splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name):
    inline = "\n".join(re.findall(r"`([^`\n]*python [^`\n]*)`", text(name)))
    commands = re.findall(r"python ([\w/]+\.py(?: [^\n#]*)?)", bash(text(name)) + "\n" + inline)
    assert commands
    for command in commands:
        script, *options = shlex.split(command)
        if script == "mine.py":  # the reader's own, a copy of grpo.py
            script = "grpo.py"
        if script in SCRIPTS and options != ["--help"]:
            # exits on an unknown option or a bad value
            tyro.cli(SCRIPTS[script].Args, args=options)
            continue
        code = text(script)  # a benchmark's: options are its own, or for some those of the scripts
        for option in re.findall(r"(?<= --)(?:no-)?([a-z][a-z0-9-]*)", command):
            field = option.replace("-", "_")
            assert re.search(rf"^    {field}: ", code, re.MULTILINE) or field in {
                *vars(grpo.Args()),
                "help",
            }, command


@pytest.mark.parametrize("name", NAMES)
def test_every_option_exists(name):
    known = {field for script in SCRIPTS.values() for field in vars(script.Args())}
    benchmarks = "\n".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    for option in re.findall(r"`--(?:no-)?([a-z][a-z0-9-]*)", text(name)):
        field = option.replace("-", "_")
        torchruns = {"shutdown_timeout"}
        assert field in known | torchruns | {"help"} or re.search(
            rf"^    {field}: ", benchmarks, re.MULTILINE
        ), option


def test_versions_are_those_of_the_requirements():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", text("requirements.txt"), re.MULTILINE))
    (torch_version,) = re.findall(r"PyTorch ([\d.]+\d)", README)
    assert torch_version == pins["torch"]
    for name in NAMES:
        assert set(re.findall(r"(?i)\bvllm(?:==| )(\d+\.[\d.]*\d)", text(name))) <= {
            VLLM_VERSION
        }, name


def test_its_example_before_training_is_what_the_model_writes():
    (prompt, response) = re.search(
        r"^(Q: .*)\nbefore training: (.*)$", README, re.MULTILINE
    ).groups()
    tokenizer = load_tokenizer(TINY_MODEL)
    model = load_model(TINY_MODEL, "", torch.device("cpu"))
    sampler = TransformersSampler(
        model, {tokenizer.eos_token_id}, grpo.Args.max_response_tokens, 1.0
    )
    (tokens,) = sampler.greedy([tokenizer(f"{prompt}\nA:")["input_ids"]]).responses
    assert tokenizer.decode(tokens, skip_special_tokens=True) == response
    task = load_task("addition")
    assert task.reward({"answer": 131}, response) == 0.0
    after = re.search(r"^after training:  (.*)$", README, re.MULTILINE)[1]
    assert task.reward({"answer": 131}, after) == 1.0


def test_its_example_of_a_task_is_short_and_can_be_learned(tmp_path):
    (code,) = re.findall(r"```python\n(# triples\.py\n.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 20
    (tmp_path / "triples.py").write_text(code)
    name = f"{tmp_path / 'triples.py'}:Triples"
    task = load_task(name)
    problem, *_ = task.problems("eval")
    responses = [" 80+80=160 160+80=240 answer 240.", " 80+80=160 160+80=240 answer 240. so"]
    assert task.rewards([problem] * 2, responses) == [1.0, 0.0]
    prompts = [
        {problem["prompt"] for problem in task.problems(split)} for split in ("train", "eval")
    ]
    assert not prompts[0] & prompts[1]
    # The bundled model earns something in its first step.
    run = train(tmp_path, task=name, num_steps=1, max_response_tokens=64)
    assert [record["reward/mean"] > 0 for record in steps(run)] == [True]


def example(name, directory):
    """Writes a task's file that common/README.md shows; returns what follows `for` in its first
    line, as words.
    """
    pattern = rf"```python\n(# {name}\.py, for ([^\n]*)\n.*?)```"
    ((code, words),) = re.findall(pattern, text("common/README.md"), re.DOTALL | re.MULTILINE)
    (directory / f"{name}.py").write_text(code)
    return shlex.split(words)


def test_the_example_of_a_task_that_reads_data_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("country,capital\nPeru,Lima\nChad,N'Djamena\n")
    (tmp_path / "test.csv").write_text("country,capital\nOman,Muscat\n")
    words = example("capitals", tmp_path)
    assert helpers.command(*words, *as_options({**SMALL, "num_steps": 1, "name": "run"})) == 0
    task = load_task(words[1], "train.csv", "test.csv")
    assert [problem["answer"] for problem in task.problems("train")] == ["Lima", "N'Djamena"]
    assert task.rewards(task.problems("eval"), [" Muscat, of course"]) == [1.0]


def test_the_example_of_a_task_for_a_chat_model_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = example("doubling", tmp_path)
    assert helpers.command(*words, *as_options({**SMALL, "num_steps": 1, "name": "run"})) == 0
    (record,) = steps("runs/run")
    assert record["reward/mean"] == pytest.approx(0.1 * record["brief"])
    task = load_task(words[1])
    found = [task.reward({"answer": 6}, said)["reward"] for said in ("6", "Answer: 6", "Answer: 7")]
    assert found == pytest.approx([0.1, 1.3, 0.3])


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), target


def anchors(text):
    """The anchors that GitHub gives the titles of a document."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["common/README.md"])
def test_the_file_map_is_complete(name):
    folder = (ROOT / name).parent
    listed = set(re.findall(r"\]\(([^)#\s]+)\)", text(name).split("## File map")[1]))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert {file for file in files if text(f"common/{file}").count("\n") > 1} - listed == set()


@pytest.mark.parametrize("name", ["common/README.md"])
def test_the_table_of_metrics_is_complete(name, tmp_path):
    table = text(name).split("## Metrics")[1].split("\n## ")[0]
    documented, prefix = set(), ""
    for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE):
        for key in re.findall(r"`([^`]+)`", row):
            prefix = prefix if key.startswith("/") else key.rpartition("/")[0]
            documented.add(prefix + key if key.startswith("/") else key)
    logged = {
        key for record in steps(train(tmp_path, num_steps=1, eval_interval=1)) for key in record
    }
    assert logged - documented - {"step"} == set()
