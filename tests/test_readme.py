"""What the README says is so: generated parts are fresh, commands parse, defaults are the code's, links exist."""

import dataclasses
import re
import shlex

import pytest
import tyro

import grpo
import rec_oneside_nois
import red_weight
from common.tasks import load_task
from tests.readme import ROOT, refresh

README = (ROOT / "README.md").read_text()
SCRIPTS = {"grpo.py": grpo, "rec_oneside_nois.py": rec_oneside_nois, "red_weight.py": red_weight}
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")


def test_generated_parts_are_fresh():
    assert refresh(README) == README, "run `python tests/readme.py`"


def test_it_gives_the_two_commands():
    lines = BASH.splitlines()
    assert "pip install -r requirements.txt && python grpo.py" in lines
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest" in lines


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python (\w+\.py.*)", BASH))))
def test_every_command_parses(line, tmp_path):
    script, *options = shlex.split(line)
    assert (ROOT / script).is_file() or script in ("mine.py",)
    if script in SCRIPTS:
        tyro.cli(SCRIPTS[script].Args, args=options)  # exits on an unknown option or a bad value


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_the_defaults_it_quotes_are_the_codes(script):
    defaults = {f"--{f.name.replace('_', '-')}": str(f.default) for f in dataclasses.fields(script.Args)}
    quoted = dict(re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|$", README, re.MULTILINE))
    assert len(quoted) >= 8
    assert {option: defaults[option] for option in quoted} == quoted


def test_its_example_of_a_task_is_short_and_works(tmp_path):
    (code,) = re.findall(r"```python\n(# reverse\.py\n.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 20
    (tmp_path / "reverse.py").write_text(code)
    task = load_task(f"{tmp_path / 'reverse.py'}:Reverse")
    (problem,) = task.problems("eval")
    assert task.rewards([problem], ["it is drawer"]) == [1.0] and task.rewards([problem], ["reward"]) == [0.0]


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_ci_runs_the_commands_as_printed():
    ci = (ROOT / ".ci" / "run").read_text()
    for fragment in re.findall(r"grep -m1 .*?'([^']+)' README.md", ci):
        assert fragment in BASH
