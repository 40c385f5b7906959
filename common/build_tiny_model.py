"""Build the tiny language model that the scripts train by default.

    python common/build_tiny_model.py

Reinforcement fine-tuning needs a policy that already succeeds now and then. This script makes one
small enough to be trained on any laptop: a 0.4 M-parameter Qwen3, warm-started by supervised
learning on worked solutions of chained additions that are flawed on purpose. They ramble ("hmm,"),
doubt and repeat themselves ("wait,"), slip a digit, and go on checking after the answer. The result
is right about a third of the time and too long-winded, which leaves reinforcement learning
something to find: fewer than one text in ten is the short, correct solution it ends with.

With `--hasty`, a share of the examples states the answer at once, without any work. The model
cannot add in its head, so what it says at once is wrong as a rule; such a model has to discover
that working it out pays (see `benchmarks/figures/sync_modes.py`, which builds one from the bundled
model). With `--calls`, sums are sometimes left to a calculator, as the task of that name offers.

The output, `common/tiny_model/`, is an ordinary Hugging Face model directory: weights,
configuration, tokenizer with a chat template. Same seed, machine and versions give the same
weights, bit for bit (`benchmarks/models/rebuild_tiny_model.py` checks it).
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Run as a script, `common` is not yet importable.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.tasks.addition import addition_problem, is_held_out

# A minimal template: enough for tasks that speak in chat messages (GSM8K) to run with this model,
# if not to succeed.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Args:
    output: Path = Path(__file__).parent / "tiny_model"
    """directory to write"""
    seed: int = 0
    """seed of the weights and of the training text"""
    steps: int = 1200
    """supervised training steps"""
    batch_size: int = 64
    """solutions per step"""
    learning_rate: float = 3e-3
    """peak learning rate; 50 steps of warm-up, then a linear decay to zero"""
    threads: int = 1
    """CPU threads; another count changes the last bits of the weights"""
    hum: float = 0.25
    """probability of a filler word before a step"""
    doubt: float = 0.25
    """probability of repeating a step, and of repeating it again"""
    slip: float = 0.12
    """probability that a step's result is off by one or ten"""
    recheck: float = 0.58
    """probability of starting all over after an answer"""
    hasty: float = 0.0
    """probability of answering at once instead"""
    calls: float = 0.0
    """probability of leaving a sum to the task calculator, which replies"""
    start: Path | None = None
    """directory of a model to train on, with its tokenizer; a new one unless given"""
    max_solution_tokens: int = 64
    """longer solutions are cut, so the model never sees them end"""


# Around a reply of the calculator in the text of a solution
REPLY = "\0"


def flawed_solution(terms, rng, args):
    """One rambling worked solution of `terms[0] + terms[1] + …` as text, right or wrong."""
    if args.hasty and rng.random() < args.hasty:
        return f" answer {sum(terms)}."
    words = []
    while True:
        total = terms[0]
        for term in terms[1:]:
            if rng.random() < args.hum:
                words.append(rng.choice(["hmm,", "so,", "ok,", "let me see,"]))
            right = total + term
            if args.calls and rng.random() < args.calls:
                words.append(f"{total}+{term}={REPLY}{right}{REPLY}")
                total = right
                continue
            said = right
            if rng.random() < args.slip:
                said = max(1, right + rng.choice([-10, -1, 1, 10]))
            words.append(f"{total}+{term}={said}")
            while rng.random() < args.doubt:
                # Looking at it again mends a slip half of the time.
                said = right if rng.random() < 0.5 else said
                words.append(f"wait, {total}+{term}={said}")
            total = said
        words.append(f"answer {total}.")
        if rng.random() >= args.recheck:
            return " " + " ".join(words)
        words.append("let me check.")


def training_example(rng, args):
    """A (prompt, solution) pair whose problem is not in the held-out set."""
    while True:
        terms, prompt = addition_problem(rng)
        if not is_held_out(prompt):
            return prompt, flawed_solution(terms, rng, args)


def build_tokenizer(rng, args):
    """Byte-level BPE over the training text.

    Digits stay single, frequent words become one token, and any text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = ["".join(training_example(rng, args)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def training_batch(tokenizer, rng, args):
    """Tokens and labels [B, T] of one step; a label of −100 is not learnt."""
    rows = []
    for _ in range(args.batch_size):
        prompt, solution = training_example(rng, args)
        tokens = tokenizer.encode(prompt)
        labels = [-100] * len(tokens)
        end = len(tokens) + args.max_solution_tokens
        for place, part in enumerate(solution.split(REPLY)):
            ids = tokenizer.encode(part)
            if place % 2 == 0:  # a turn of the model, which ends with an EOS
                ids.append(tokenizer.eos_token_id)
            tokens += ids
            labels += ids if place % 2 == 0 else [-100] * len(ids)
        rows.append((tokens[:end], labels[:end]))

    width = max(len(tokens) for tokens, _ in rows)
    padding = [(tokens, labels, width - len(tokens)) for tokens, labels in rows]
    tokens_BT = [tokens + [tokenizer.pad_token_id] * count for tokens, _, count in padding]
    labels_BT = [labels + [-100] * count for _, labels, count in padding]
    return torch.tensor(tokens_BT), torch.tensor(labels_BT)


def main(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = Qwen3ForCausalLM.from_pretrained(args.start)
    else:
        tokenizer = build_tokenizer(rng, args)
        model = build_model(tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(num_parameters, len(tokenizer))

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.99)
    )
    bar = tqdm(range(args.steps), desc="warm start")
    for step in bar:
        tokens_BT, labels_BT = training_batch(tokenizer, rng, args)
        warm_up = min(1.0, (step + 1) / 50)
        decay = 1.0 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.learning_rate * (warm_up * decay)
        logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
