"""Responses of several turns, decoded in one batch whose rows are answered at different times."""

import torch


class Dialogue:
    """What the environment says in the rows of a batch.

    A reply is written into its row as soon as a turn has ended, ahead of time. Its tokens are then
    read one by one like any others, in place of sampled ones. So the cache need not know of turns,
    and no row waits for another. (For replies of some tens of tokens, reading each reply at once
    would be faster.) `tokens_BT` is what the sampler decodes into. If it has no environment, a
    response is a single turn, and nothing happens here.
    """

    def __init__(self, sampler, problems, group_size, tokens_BT):
        self.sampler = sampler
        self.environment = sampler.environment
        self.problems = problems  # one per group
        self.group_size = group_size
        self.tokens_BT = tokens_BT
        self.told_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)  # tokens of replies
        self.no_room_B = torch.zeros_like(self.told_BT[:, 0])

    def told_or(self, token_R1, rows_R, t):
        """Token t of these rows: the reply's if it has one, else the sampled one."""
        if self.environment is None:
            return token_R1
        told_R1 = self.told_BT[rows_R, t].unsqueeze(1)
        return torch.where(told_R1, self.tokens_BT[rows_R, t].unsqueeze(1), token_R1)

    def answer(self, eos_R, rows_R, t):
        """Reply to the rows whose token t is an EOS that ends a turn; which of them end with it?"""
        if self.environment is None:
            return eos_R
        ends_R = eos_R & ~self.told_BT[rows_R, t]
        asked = rows_R[ends_R].tolist()
        if not asked:
            return ends_R
        responses = []
        for row in asked:
            told = self.told_BT[row, : t + 1].tolist()
            logprobs = [None if is_told else 0.0 for is_told in told]
            responses.append((self.tokens_BT[row, : t + 1].tolist(), logprobs))
        problems = [self.problems[row // self.group_size] for row in asked]
        room = self.tokens_BT.shape[1] - (t + 1)
        rooms = [room] * len(asked)
        replies = self.environment.replies(problems, responses, rooms, self.sampler.heartbeat)
        goes_on = []
        for row, reply in zip(asked, replies, strict=True):
            self.no_room_B[row] = reply is None
            goes_on.append(bool(reply))
            if reply:
                place = slice(t + 1, t + 1 + len(reply))
                self.tokens_BT[row, place] = torch.tensor(reply, device=self.tokens_BT.device)
                self.told_BT[row, place] = True
        ends_R[ends_R.clone()] = ~torch.tensor(goes_on, device=ends_R.device)
        return ends_R

    def marked(self, samples):
        """`Samples` without log-probs of replies; truncated where a reply did not fit."""
        if self.environment is None:
            return samples
        for row, place in self.told_BT.nonzero().tolist():
            samples.logprobs[row][place] = None
        for row in self.no_room_B.nonzero().flatten().tolist():
            samples.truncated[row] = True
        return samples
