"""What rollouts.jsonl records: some responses token by token, for the page of rollouts."""

import math

# Recorded of a step: the first groups of its batch, so that runs with the same seed show the same
# prompts
GROUPS = 2
# Tokens recorded of a step; each of its responses gets an equal share.
MOST_TOKENS = 16_384
# Held-out problems whose answers are recorded at each evaluation
HELD_OUT = 4


def token_values(micro, rows):
    """Values of the response tokens of a micro-batch: {row: {name: list}}, for those among `rows`.

    Where replies stand between turns, "told" says which tokens are theirs.

    Call it after the backward pass. With L the loss, `push` is −∂L/∂log π of a token over its
    weight in the loss: in which direction, and how strongly, the update pushes the token's
    log-prob. It is 0 where the loss clipped the token. It is missing where there was no backward
    pass, as `to_reference` is without a reference.
    """
    lp_BT = micro.logprobs_BT.detach().double()
    values = {
        "logprob": lp_BT,
        "ratio": (lp_BT - micro.sampler_logprobs_BT.double()).exp(),
        "entropy": micro.entropy_BT,
    }
    if micro.reference_logprobs_BT is not None:
        values["to_reference"] = lp_BT - micro.reference_logprobs_BT.double()
    if micro.learns and micro.logprobs_BT.grad is not None:
        values["push"] = -micro.logprobs_BT.grad.double() / micro.weights_B1.double()
    found = {}
    for place, row in enumerate(micro.rows):
        if row in rows:
            sampled = micro.mask_BT[place].nonzero().squeeze(1)
            start, end = sampled[0].item(), sampled[-1].item() + 1
            span = slice(start, min(end, start + MOST_TOKENS // len(rows)))
            found[row] = {name: all_BT[place, span].tolist() for name, all_BT in values.items()}
            told = ~micro.mask_BT[place, span]
            if told.any():
                found[row]["told"] = told.tolist()
    return found


def group_records(step, batch, values, problem_set):
    """The lines of rollouts.jsonl for the recorded groups of a step, as dicts.

    `batch` is the step's whole `Batch`, `values` are those of `token_values`, by row; `problem_set`
    has its problems and the tokenizer.
    """
    rewards_B = batch.rewards_PG.flatten()
    advantages_B = batch.advantages_PG.flatten()
    rows = sorted(values)
    for start in rows[:: batch.group_size]:
        responses = []
        for row in rows[start : start + batch.group_size]:
            tokens = batch.responses[row]
            shown = tokens[: len(values[row]["logprob"])]
            response = {
                "length": len(tokens),
                "truncated": batch.truncated[row],
                "tokens": token_texts(problem_set.tokenizer, shown),
            }
            numbers = {"reward": rewards_B[row], "advantage": advantages_B[row], **values[row]}
            numbers.setdefault("push", None)
            if "told" in numbers:
                response["told"] = numbers.pop("told")
            responses.append(response | {name: rounded(value) for name, value in numbers.items()})
        problem = problem_set.problems[batch.problems[start]]
        yield {"step": step, **posed(problem), "responses": responses}


def held_out_records(step, answers):
    """The lines of rollouts.jsonl for an evaluation's answers: (problem, response, grade) each."""
    for problem, text, grade in answers[:HELD_OUT]:
        yield {"step": step, **posed(problem), "greedy": text, "reward": rounded(grade["reward"])}


def posed(problem):
    """A problem's prompt and, if it has one, the answer that is expected, as text."""
    answer = problem.get("answer")
    return {"prompt": problem["prompt"], "answer": answer if answer is None else str(answer)}


def token_texts(tokenizer, ids):
    """The text of each token, special ones included; joined, they are the decoded response.

    Of tokens that share a character, as bytes of an emoji do, the last has it and the others are
    empty.
    """
    texts = []
    # ids[start:read] are decoded again, since a token's space depends on the token before it.
    start = 0
    read = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            known = tokenizer.decode(ids[start:read])
            texts.append(text[len(known) :])
            start, read = read, end
    return texts


def rounded(value):
    """A number, or each of a list, to three significant digits; None for what is not finite."""
    if value is None:
        return None
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if not math.isfinite(value):
        return None
    return float(f"{value:.3g}") + 0.0  # the sum, because −0.0 + 0.0 is 0.0
