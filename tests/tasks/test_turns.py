"""Tasks of several turns: what is the policy's and what is not, from the sampler to the loss.

Independent truths: a naive greedy loop that reads one whole sequence for each token, log-probs of a
plain forward pass, a float64 loop over the sampled tokens.
"""

import copy
import json
import math
import pickle
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import variants
from common.batching import collate
from common.errors import BadInput, RunStopped
from common.layers import use_threads
from common.metrics import StepMetrics
from common.models import load_model, load_tokenizer, location
from common.sampling import Batch
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import sampler_mismatch
from common.tasks import load_task
from common.tasks.calculator import Calculator
from common.tasks.problems import ProblemSet, load_problems
from common.tasks.turns import (
    Environment,
    around_a_reply,
    parts_of,
    warn_of_endless_responses,
)
from tests.helpers import (
    CHATML,
    Run,
    assert_same_run,
    checkpoint,
    command,
    forked_samplers,
    import_script,
    kill,
    metrics,
    options,
    resume,
    rollouts,
    train,
    wait_for,
    write_task,
)

CPU = torch.device("cpu")
BEAT = torch.zeros(1, dtype=torch.int64)

# The bundled model answers one sum after another: a new one is the reply.
SUMS = """
from common.tasks import Task


class Sums(Task):
    max_turns = 3

    def problems(self, split):
        first, count = {"train": (11, 30), "eval": (60, self.eval_size)}[split]
        return [{"prompt": f"Q: {n}+{n + 7}+5\\nA:", "n": n} for n in range(first, first + count)]

    def reply(self, problem, turns):
        if problem["n"] % 3 == 0:
            return None
        return f"\\nQ: {problem['n'] + len(turns)}+{len(turns)}+9\\nA:"

    def reward(self, problem, turns):
        text = "".join(turns)
        digits = sum(character.isdigit() for character in text)
        return {"reward": digits / max(1, len(text)), "said": len(turns)}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    use_threads(1)


@pytest.fixture(scope="module")
def task_name(tmp_path_factory):
    return f"{write_task(tmp_path_factory.mktemp('task'), SUMS, 'sums.py')}:Sums"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", "", CPU)


def environment_of(task, tokenizer, chat=False, timeout=60.0):
    source = (task, "", "", 8)
    ends = {tokenizer.eos_token_id}
    return Environment(load_task(*source), source, tokenizer, ends, chat, timeout)


def written(tmp_path, body, **attributes):
    """The name of a task whose method `reply` has this body."""
    more = "".join(f"    {name} = {value!r}\n" for name, value in attributes.items())
    text = SUMS.replace("    max_turns = 3\n", f"    max_turns = 3\n{more}")
    start, end = text.index("        if problem["), text.index("    def reward")
    return f"{write_task(tmp_path, text[:start] + body + text[end:], 'task.py')}:Sums"


def test_parts_of_a_response():
    response = [5, 6, 0, 7, 8, 9, 0]
    logprobs = [-1.0, -2.0, 0.0, None, None, -3.0, -0.5]
    parts = [(True, [5, 6, 0]), (False, [7, 8]), (True, [9, 0])]
    assert parts_of(response, logprobs) == parts
    assert parts_of([5], [-1.0]) == [(True, [5])] and parts_of([], []) == []


# Sampling


def sampled(model, tokenizer, task_name, greedy=False, max_tokens=160):
    problems = load_problems(load_task(task_name, eval_size=8), "train", tokenizer, 100)
    environment = environment_of(task_name, tokenizer)
    ends = {tokenizer.eos_token_id}
    sampler = TransformersSampler(model, ends, max_tokens, 1.0, "float32", environment)
    rows = range(8)
    prompts = [problems.prompts[row] for row in rows]
    asked = [problems.problems[row] for row in rows]
    if greedy:
        return problems, sampler.greedy(prompts, asked)
    return problems, sampler.sample(prompts, 3, [10 * row for row in rows], asked)


def replies_in(response, logprobs, tokenizer):
    return [
        tokenizer.decode(tokens)
        for is_sampled, tokens in parts_of(response, logprobs)
        if not is_sampled
    ]


def test_every_turn_ends_with_eos_and_is_answered(model, tokenizer, task_name):
    problems, samples = sampled(model, tokenizer, task_name)
    counts = set()
    for row, (response, logprobs) in enumerate(
        zip(samples.responses, samples.logprobs, strict=True)
    ):
        n = problems.problems[row // 3]["n"]
        parts = parts_of(response, logprobs)
        turns = [tokens for is_sampled, tokens in parts if is_sampled]
        counts.add(len(turns))
        assert len(response) <= 160 and len(logprobs) == len(response)
        *before, last = turns
        assert all(turn.index(tokenizer.eos_token_id) == len(turn) - 1 for turn in before)
        complete = last[-1] == tokenizer.eos_token_id
        expected = [f"\nQ: {n + k}+{k}+9\nA:" for k in range(1, len(turns))]
        assert replies_in(response, logprobs, tokenizer) == expected
        if complete and not samples.truncated[row]:
            assert len(turns) == (1 if n % 3 == 0 else 3)
        if not complete:
            assert samples.truncated[row]
    assert counts == {1, 2, 3}


def test_log_probs_of_sampled_tokens_are_those_of_one_forward_pass(model, tokenizer, task_name):
    problems, samples = sampled(model, tokenizer, task_name)
    told = 0
    for row, (response, logprobs) in enumerate(
        zip(samples.responses, samples.logprobs, strict=True)
    ):
        prompt = problems.prompts[row // 3]
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0]
        plain_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        for t, (token, logprob) in enumerate(zip(response, logprobs, strict=True)):
            told += logprob is None
            assert logprob is None or logprob == pytest.approx(plain_TV[t, token].item(), abs=1e-4)
    assert told > 100


def test_greedy_responses_are_those_of_a_naive_loop(model, tokenizer, task_name):
    problems, found = sampled(model, tokenizer, task_name, greedy=True, max_tokens=100)
    task, eos = load_task(task_name, eval_size=8), tokenizer.eos_token_id
    for row in range(8):
        tokens, turn, turns, cut = [], [], [], True
        while len(tokens) < 100:
            with torch.no_grad():
                ids = torch.tensor([problems.prompts[row] + tokens])
                token = model(input_ids=ids).logits[0, -1].argmax().item()
            tokens.append(token)
            turn.append(token)
            if token != eos:
                continue
            turns.append(tokenizer.decode(turn, skip_special_tokens=True))
            turn = []
            reply = task.reply(problems.problems[row], turns) if len(turns) < 3 else None
            if reply is None:
                cut = False
                break
            ids = tokenizer.encode(reply, add_special_tokens=False)
            if len(ids) >= 100 - len(tokens):
                break
            tokens += ids
        assert (found.responses[row], found.truncated[row]) == (tokens, cut)


def test_what_is_sampled_depends_neither_on_the_batch_nor_on_who_is_beside(
    model, tokenizer, task_name
):
    problems, together = sampled(model, tokenizer, task_name)
    environment = environment_of(task_name, tokenizer)
    sampler = TransformersSampler(model, {tokenizer.eos_token_id}, 160, 1.0, "float32", environment)
    for row in range(3):
        alone = sampler.sample([problems.prompts[row]], 3, [10 * row], [problems.problems[row]])
        assert alone.responses == together.responses[3 * row : 3 * row + 3]


# The environment


def ask(name, tokenizer, turns=("7+5=12",), room=100, problem=None, **options):
    """The environment's reply to a response of these turns, as token ids."""
    environment = environment_of(name, tokenizer, **options)
    tokens, logprobs = [], []
    for number, turn in enumerate(turns):
        if number:
            tokens += tokenizer.encode(" ok")
            logprobs += [None] * len(tokenizer.encode(" ok"))
        ids = [*tokenizer.encode(turn), tokenizer.eos_token_id]
        tokens += ids
        logprobs += [-1.0] * len(ids)
    problem = problem or {"prompt": "Q: 1+2\nA:", "n": 11}
    (reply,) = environment.replies([problem], [(tokens, logprobs)], [room], BEAT)
    return reply


def test_replies_may_be_waited_for_together(tmp_path, tokenizer):
    path = written(tmp_path, "        return '|'.join(turns)\n").rpartition(":")[0]
    text = Path(path).read_text().replace("def reply", "async def reply")
    Path(path).write_text(text)
    assert tokenizer.decode(ask(f"{path}:Sums", tokenizer, ["a", "b"])) == "a|b"


def test_the_task_sees_the_turns_without_replies_and_special_tokens(tmp_path, tokenizer):
    name = written(tmp_path, "        return '|'.join(turns)\n")
    assert tokenizer.decode(ask(name, tokenizer, (" 1+1", " 2+2"))) == " 1+1| 2+2"
    assert ask(name, tokenizer, (" 1", " 2", " 3")) == []  # that was the last turn
    assert ask(written(tmp_path, "        return None\n"), tokenizer) == []


def test_a_reply_that_leaves_no_room_for_another_token_ends_the_response(tmp_path, tokenizer):
    name = written(tmp_path, "        return '12345'\n")
    assert ask(name, tokenizer, room=6) == tokenizer.encode("12345")
    assert ask(name, tokenizer, room=5) is None


def test_text_of_a_tool_that_looks_like_a_special_token_stays_text(tmp_path, tokenizer):
    name = written(tmp_path, "        return 'see <|end|> there'\n")
    reply = ask(name, tokenizer)
    assert tokenizer.eos_token_id not in reply
    assert tokenizer.decode(reply) == "see <|end|> there"


def test_tokens_across_a_border_are_not_merged(tmp_path, tokenizer):
    # Together, the text of a turn and a reply would be encoded in another way.
    turn, reply = " answ", "er let me check"
    assert tokenizer.encode(turn + reply) != tokenizer.encode(turn) + tokenizer.encode(reply)
    name = written(tmp_path, f"        return {reply!r}\n")
    assert ask(name, tokenizer, (turn,)) == tokenizer.encode(reply)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("        raise ValueError('no tool')\n", r"Sums\.reply raised ValueError\('no tool'\)"),
        ("        return 7\n", r"Sums\.reply returned 7 .* it must be None, or a text"),
        ("        return ''\n", r"Sums\.reply returned '' .* not empty"),
        ("        import random\n        return str(random.random())\n", "gave two answers"),
        ("        import time\n        time.sleep(9)\n", r"has not answered for 0\.3 s"),
        ("        import sys\n        sys.exit('bye')\n", r"failed: SystemExit\('bye'\)"),
    ],
)
def test_a_reply_that_cannot_be_used_is_one_sentence(body, words, tmp_path, tokenizer):
    with pytest.raises(RunStopped, match=words):
        ask(written(tmp_path, body), tokenizer, timeout=0.3)


def test_the_heart_beats_while_a_tool_works(tmp_path, tokenizer):
    name = written(tmp_path, "        import time\n        time.sleep(1.2)\n        return 'x'\n")
    before = BEAT.item()
    ask(name, tokenizer)
    assert BEAT.item() >= before + 2  # it was asked twice


def test_a_reply_may_use_what_problems_has_prepared(tmp_path, tokenizer):
    name = written(tmp_path, "        return self.known\n")
    task = load_task(name, eval_size=8)
    task.known = "prepared"
    ends = {tokenizer.eos_token_id}
    environment = Environment(task, (name, "", "", 8), tokenizer, ends, False, 60.0)
    response = ([*tokenizer.encode(" 3"), tokenizer.eos_token_id], [-1.0, -1.0, -1.0])
    problem = {"prompt": "Q: 1+2\nA:", "n": 11}
    (reply,) = environment.replies([problem], [response], [50], BEAT)
    assert tokenizer.decode(reply) == "prepared"


def test_a_reply_cannot_change_what_the_reward_gets(tmp_path, tokenizer):
    name = written(tmp_path, "        problem.clear()\n        turns.clear()\n        return 'x'\n")
    problem = {"prompt": "Q: 1+2\nA:", "n": 11}
    ask(name, tokenizer, problem=problem)
    assert problem == {"prompt": "Q: 1+2\nA:", "n": 11}


def test_another_process_can_have_it(task_name, tokenizer):
    environment = pickle.loads(pickle.dumps(environment_of(task_name, tokenizer)))
    response = ([*tokenizer.encode(" 3"), tokenizer.eos_token_id], [-1.0, -1.0, -1.0])
    problem = {"prompt": "Q: 1+2\nA:", "n": 11}
    (reply,) = environment.replies([problem], [response], [50], BEAT)
    assert tokenizer.decode(reply) == "\nQ: 12+1+9\nA:"


def test_many_replies_may_be_asked_for_at_once(tmp_path, tokenizer):
    more = """
    def replies(self, problems, turns):
        return [f"{len(problems)} of {len(turns)}" for _ in turns]
"""
    path = write_task(tmp_path, SUMS + more, "many.py")
    environment = environment_of(f"{path}:Sums", tokenizer)
    response = ([*tokenizer.encode(" 3"), tokenizer.eos_token_id], [-1.0, -1.0, -1.0])
    problem = {"prompt": "Q: 1+2\nA:", "n": 11}
    replies = environment.replies([problem] * 3, [response] * 3, [50] * 3, BEAT)
    assert [tokenizer.decode(reply) for reply in replies] == ["3 of 3"] * 3


# Chat templates, in the manner of common ones

LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
# Knows two roles only, and calls the assistant model
GEMMA = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('roles must be user or assistant') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Leaves out a role that it does not know
SILENT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops the thinking of all turns but the last, by their number
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 == 1 and messages | length == 3 %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = """
from common.tasks import Task


class Chats(Task):
    def problems(self, split):
        return [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(4)]

    def reward(self, problem, response):
        return len(response)
"""
AROUND = {
    ("chatml", "user"): (
        CHATML, "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("chatml", "tool"): (
        CHATML, "<|im_end|>\n<|im_start|>tool\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("llama", "user"): (
        LLAMA, "<|eot|><|start|>user<|header|>\n\n",
        "<|eot|><|start|>assistant<|header|>\n\n"),
    ("gemma", "user"): (GEMMA, "<eot>\n<turn>user\n", "<eot>\n<turn>model\n"),
    ("gemma", "tool"): (GEMMA, None, "roles must be user or assistant"),
    ("mistral", "user"): (MISTRAL, "</s>[INST] ", " [/INST]"),
    ("silent", "user"): (SILENT, "<user>", "<assistant>"),
    ("silent", "tool"): (SILENT, None, "has no place for replies"),
    ("thinking", "user"): (
        THINKING, "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "role"), AROUND)
def test_what_stands_around_a_reply_comes_from_the_template(template, role):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template, before, after = AROUND[template, role]
    task = Calculator()
    task.reply_role = role
    if before is None:
        with pytest.raises(BadInput, match=after):
            around_a_reply(tokenizer, task)
    else:
        assert around_a_reply(tokenizer, task) == (before, after)


def test_a_chat_goes_on_after_the_policys_own_eos(tmp_path):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    name = written(tmp_path, "        return 'hm'\n")
    problem = {"prompt": [{"role": "user", "content": "Go"}], "n": 11}
    reply = ask(name, tokenizer, problem=problem, chat=True)
    expected = "\n<|im_start|>user\nhm<|end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(reply) == expected
    assert reply.count(tokenizer.eos_token_id) == 1  # the template's, not the tool's


# Where responses may not end

CHAT = [{"role": "user", "content": "Go"}]
IS_CHAT_MODEL = "is a chat model, and may continue plain text without an end"


@pytest.mark.parametrize(
    ("template", "prompts", "said"),
    [
        (CHATML.replace("<|im_end|>", "<|end|>"), [CHAT], ""),
        (CHATML.replace("<|im_end|>", "<|end|>"), ["Go"], IS_CHAT_MODEL),
        (CHATML.replace("<|im_end|>", "<|end|>"), [CHAT, "Go"], IS_CHAT_MODEL),
        (CHATML.replace("<|im_end|>", "<|pad|>"), [CHAT], "a turn with '<|pad|>', which is no EOS"),
        (CHATML.replace("<|im_end|>", "<|pad|>"), ["Go"], ""),  # a base model
        (load_tokenizer("tiny").chat_template, [CHAT, "Go"], ""),  # no token stands for an end
        (SILENT, [CHAT, "Go"], ""),
        (None, ["Go"], ""),
    ],
)
def test_prompts_that_no_eos_may_answer(template, prompts, said, capsys):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = template
    problems = [{"prompt": prompt} for prompt in prompts]
    problem_set = ProblemSet(Calculator(), tokenizer, problems, [])
    warn_of_endless_responses([problem_set], {tokenizer.eos_token_id})
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == bool(said)
    ids = sorted([tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert (f'"eos_token_id": {ids} in its generation_config.json' in error) == ("no EOS" in said)


def test_an_eos_that_the_models_directory_lists_is_no_surprise(tmp_path, capsys):
    """What the warning says to do is enough."""
    directory = shutil.copytree(location("tiny"), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|pad|>"))
    task = write_task(tmp_path, CHATS)
    settings = {"task": f"{task}:Chats", "model": directory, "num_steps": 1}
    train(tmp_path, "before", **settings)
    advice = re.search(r'set "eos_token_id": (.*) in its', capsys.readouterr().err)[1]
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": json.loads(advice)}))
    train(tmp_path, "after", **settings)
    assert "no EOS" not in capsys.readouterr().err


# Loss and gradient

G = 4
KL_COEF = 0.1
REWARDS = [1.0, 0.0, 0.5, 0.0]


def several_turns(rng):
    """A group of responses of up to four turns: prompts, responses, log-probs where sampled."""
    prompts = [[rng.randrange(5, 250) for _ in range(4)]] * G
    responses, logprobs = [], []
    for turns in (1, 2, 4, 1):
        tokens, lps = [], []
        for turn in range(turns):
            if turn:
                told = rng.randint(1, 5)
                tokens += [rng.randrange(5, 250) for _ in range(told)]
                lps += [None] * told
            said = rng.randint(1, 6)
            tokens += [rng.randrange(5, 250) for _ in range(said)]
            lps += [-3.0] * said
        responses.append(tokens)
        logprobs.append(lps)
    return prompts, responses, logprobs


def own_logprobs(model, prompt, response, logprobs):
    """Of the tokens that the policy sampled."""
    logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    own = [t for t, logprob in enumerate(logprobs) if logprob is not None]
    return logits_TV.log_softmax(-1)[own, [response[t] for t in own]]


def loss_of_response(name, new, old, reference, advantage, N):
    """From the equations, over the tokens that the policy sampled."""
    log_ratios, d = new - old, new - reference
    low, high = 0.8, 1.3 if name == "gspo" else 1.2
    if name == "gspo":
        log_ratios = log_ratios.mean().unsqueeze(0)
    if name == "kl_in_reward":
        advantage = advantage - KL_COEF * d.sum().detach()
    ratios = log_ratios.exp()
    losses = -torch.minimum(ratios * advantage, ratios.clamp(low, high) * advantage)
    if name == "paper_grpo":
        losses = losses + KL_COEF * ((-d).exp() + d - 1)
    return losses.mean() / G if name in ("gspo", "paper_grpo") else losses.sum() / N


def script_and_args(name, directory):
    if name == "grpo":
        script = import_script("grpo.py")
        return script, script.Args(max_tokens_per_microbatch=40)
    variants.write(name, directory / f"{name}_in_turns.py")
    script = import_script(directory / f"{name}_in_turns.py")
    own = {"clip_low": 0.2, "clip_high": 0.3} if name == "gspo" else {"kl_coef": KL_COEF}
    return script, script.Args(max_tokens_per_microbatch=40, **own)


@pytest.mark.parametrize("name", ["grpo", "gspo", "kl_in_reward", "paper_grpo"])
def test_loss_and_gradient_over_the_sampled_tokens_only(name, tmp_path):
    model, reference = load_model("tiny", "", CPU), load_model("tiny", "", CPU)
    with torch.no_grad():
        reference.model.norm.weight.mul_(0.9)
    exact, exact_reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    rng = random.Random(1)
    prompts, responses, logprobs = several_turns(rng)
    rows = list(zip(prompts, responses, logprobs, strict=True))
    for row, response in enumerate(rows):  # at lag > 0: the sampler's policy was another one
        new, drift = own_logprobs(exact, *response).tolist(), (-0.5, 0.0, 0.5)[row % 3]
        old = iter([lp + drift + rng.uniform(-0.1, 0.1) for lp in new])
        logprobs[row][:] = [None if lp is None else next(old) for lp in logprobs[row]]
    batch = Batch(
        number=2, version=0, group_size=G, problems=[0] * G, prompts=prompts,
        responses=responses, logprobs=logprobs, truncated=[False] * G,
        grades=[{"reward": reward} for reward in REWARDS],
    )  # fmt: skip
    script, args = script_and_args(name, tmp_path)
    batch.advantages_PG = script.advantages(batch.rewards_PG, args)
    loss = script.gradient(batch, model, reference, args, "float32", StepMetrics())

    N = sum(lp is not None for of_row in logprobs for lp in of_row)
    mean = sum(REWARDS) / G
    std = (sum((r - mean) ** 2 for r in REWARDS) / G) ** 0.5
    total = 0.0
    for reward, response in zip(REWARDS, rows, strict=True):
        old = torch.tensor([lp for lp in response[2] if lp is not None], dtype=torch.float64)
        new = own_logprobs(exact, *response)
        initial = own_logprobs(exact_reference, *response).detach()
        advantage = (reward - mean) / (std + 1e-6)
        total = total + loss_of_response(name, new, old, initial, advantage, N)
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-5)
    expected = dict(exact.named_parameters())
    norm = sum(p.grad.square().sum() for p in expected.values()).sqrt()
    error = sum(
        (p.grad.double() - expected[key].grad).square().sum() for key, p in model.named_parameters()
    ).sqrt()
    assert (error / norm).item() < 1e-4
    assert batch.lengths_PG.sum().item() == N < sum(map(len, responses))
    assert collate(batch, range(G)).mask_BT.sum().item() == N


# Runs

SETTINGS = {"model": "tiny", "max_response_tokens": 100, "num_steps": 4, "rollouts_interval": 1}
STALE = {
    **SETTINGS, "max_response_tokens": 80, "sync_interval": 2, "sync_offset": 1,
    "eval_interval": 2, "checkpoint_interval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(task_name, tmp_path_factory):
    """A run with stale batches that nothing disturbed."""
    return train(tmp_path_factory.mktemp("whole"), **STALE, task=task_name)


def test_a_run_and_what_it_records(task_name, tmp_path):
    run_dir = train(tmp_path, task=task_name, **SETTINGS)
    for record in metrics(run_dir)[1:]:
        assert record["sampler_mismatch/max"] < 1e-4 and record["kl/ref_k3"] >= 0
        assert 1 <= record["turns"] <= 3 and record["turns"] == record["said"]
        assert record["environment_tokens"] > 0
        sampled_and_told = record["response_length/mean"] + record["environment_tokens"]
        assert record["response_length/mean"] < sampled_and_told <= 100
    assert "eval/turns" in metrics(run_dir)[0]
    groups = [record for record in rollouts(run_dir) if "responses" in record]
    told = [response for group in groups for response in group["responses"] if "told" in response]
    assert told
    for response in told:
        pairs = zip(response["tokens"], response["told"], strict=True)
        texts = [text for text, is_told in pairs if is_told]
        assert "".join(texts).startswith("\nQ: ") and "".join(texts).endswith("A:")
        if response["push"]:
            pairs = zip(response["push"], response["told"], strict=True)
            assert not any(push for push, is_told in pairs if is_told)
    lists = [record["greedy"] for record in rollouts(run_dir) if "greedy" in record]
    assert all(isinstance(texts, list) and len(texts) % 2 for texts in lists)


def test_beside_training_and_resumed_it_is_the_same(task_name, whole, tmp_path):
    with forked_samplers():
        beside = train(tmp_path, "beside", **STALE, task=task_name, serial=False)
    assert_same_run(whole, beside)
    assert metrics(whole)[-1]["environment_tokens"] > 0
    part = {**STALE, "task": task_name, "num_steps": 2}
    assert command(*options(tmp_path, "parts", **part)) == 0
    assert command(*resume(tmp_path / "parts", "--num-steps", 4)) == 0
    assert_same_run(whole, tmp_path / "parts")


# The third batch waits for a reply, and the first step for that. (A batch has four problems.)
HELD = """
import os
import time


class Held(Sums):
    asked, graded = set(), 0

    def reply(self, problem, turns):
        self.asked.update({{problem["n"]}} & set(range(11, 41)))
        if len(self.asked) > 8 and not os.path.exists({held!r}):
            open({held!r}, "w").close()
            time.sleep(600)
        return super().reply(problem, turns)

    def reward(self, problem, turns):
        self.graded += 1
        while self.graded == 4 + 1 and not os.path.exists({held!r}):
            time.sleep(0.01)
        return super().reward(problem, turns)
"""


def test_killed_in_the_middle_of_a_dialogue_it_ends_the_same(whole, tmp_path):
    text = SUMS + HELD.format(held=str(tmp_path / "held"))
    task = f"{write_task(tmp_path, text)}:Held"
    settings = {**STALE, "task": task, "serial": False, "checkpoint_interval": 1}
    run = Run(options(tmp_path, "killed", **settings), tmp_path / "log")
    first = tmp_path / "killed" / "checkpoints" / "step_000001.pt"
    wait_for(lambda: first.exists() or run.trainer.poll() is not None)
    assert kill(run.trainer.pid)
    assert run.end() == -signal.SIGKILL  # and nobody is left, although the tool is still at work
    (waiting,) = checkpoint(tmp_path / "killed", 1)["rollouts"]["waiting"]
    assert waiting["number"] == 2 and any(None in row for row in waiting["logprobs"])
    with forked_samplers():
        assert command(*resume(tmp_path / "killed")) == 0
    assert_same_run(whole, tmp_path / "killed")


def test_an_adapter_learns_the_same_beside_training(task_name, tmp_path):
    settings = {**STALE, "task": task_name, "lora_rank": 4, "learning_rate": 1e-3}
    serial = train(tmp_path, "serial", **settings)
    last = metrics(serial)[-1]
    assert last["environment_tokens"] > 0 and last["kl/ref_k2"] > 0
    with forked_samplers():
        assert_same_run(serial, train(tmp_path, "beside", **{**settings, "serial": False}))


def test_an_impure_reply_ends_a_run_in_a_sentence(tmp_path, capfd):
    body = "        import itertools\n        self.n = getattr(self, 'n', 0) + 1\n"
    name = written(tmp_path, body + "        return str(self.n)\n")
    assert command(*options(tmp_path, task=name, **SETTINGS)) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("grpo.py: error: Sums.reply gave two answers to the same problem")


def test_no_thread_is_left_behind(model, tokenizer, task_name):
    before = threading.active_count()
    sampled(model, tokenizer, task_name)
    assert threading.active_count() == before
    assert math.isfinite(sampler_mismatch_of(model, tokenizer, task_name))


def sampler_mismatch_of(model, tokenizer, task_name):
    problems, samples = sampled(model, tokenizer, task_name)
    batch = Batch(
        number=1, version=0, group_size=3, problems=[0] * 24,
        prompts=[problems.prompts[row // 3] for row in range(24)], **vars(samples),
    )  # fmt: skip
    return sampler_mismatch(model, 1.0, "float32", batch)["sampler_mismatch/mean"]


def test_the_calculator_is_right():
    task = Calculator()
    assert task.reply({"answer": 3}, [" ok, 44+28="]) == "72"
    assert task.reply({"answer": 3}, [" 44+28=72"]) is None
    assert task.reward({"answer": 131}, [" 44+28=", " 72+59=", " answer 131."]) == 1.0
    assert task.reward({"answer": 131}, [" answer 131.", " answer 13."]) == 0.0
