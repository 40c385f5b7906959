"""Sampling with vLLM, whose weights follow the trainer's.

The engine runs inside the process that samples.
"""

import itertools
import os
from contextlib import contextmanager

import numpy as np
import torch

from common.distributed import size, whole
from common.errors import BadInput, RunStopped
from common.layers import use_threads
from common.models import load_model, location, shapes_of
from common.progress import progress
from common.sampling import Sampler, Samples
from common.sampling.verify import canary

# Environment of an engine's process on a CPU. Every sync frees all packed weights and allocates as
# many again; Linux would take and zero these pages each time, which takes longer than filling them.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def make_vllm_sampler(
    model, revision, threads, *options, environment=None, beside=None, num_sequences=None
):
    """A `VllmSampler` that `verify.canary` has tested.

    Raises `BadInput` if it cannot start, `RunStopped` if it fails the test.
    """
    use_threads(threads)  # vLLM uses the thread count that PyTorch has at this point
    sampler = VllmSampler(
        location(model), revision, *options, beside=beside, num_sequences=num_sequences
    )
    sampler.environment = environment
    use_threads(threads)  # vLLM for GPUs has set it to 1
    if beside is None:
        beside = load_model(model, revision, torch.device("cpu"))  # a GPU is full by now
    canary(sampler, beside, sampler.precision)
    sampler.sleep()
    return sampler


def share_of_gpu(free, total, engine_bytes, largest):
    """The share of a GPU's memory that an awake engine may fill beside a trainer; sizes in bytes.

    `engine_bytes` are all that the engine can make use of, `largest` is a parameter's size in
    float32. Raises `BadInput` if nothing is left.
    """
    needed = 2**30 + 3 * largest  # for libraries and probes, and for changing a weight
    if free <= needed:
        raise BadInput(
            f"--engine vllm finds {free / 2**30:.1f} GiB of the GPU free beside weights, gradients "
            "and moments: give a smaller model or --no-reference-kl."
        )
    return min(free - needed, engine_bytes) / total


def engine_bytes(config, num_parameters, precision, num_sequences, tokens):
    """What an engine needs for that many sequences of that many tokens.

    Weights; keys and values of all tokens, in blocks of 16; 4 GiB for activations and graphs.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    itemsize = {"float32": 4, "bfloat16": 2}[precision]
    per_token = 2 * config.num_hidden_layers * key_heads * head_size * itemsize
    cache = num_sequences * (tokens + 16) * per_token
    return num_parameters * itemsize + cache + 4 * 2**30


def _share_beside(model, precision, num_sequences, tokens):
    """`share_of_gpu` beside this model of the trainer's, as its GPU's memory is filled now.

    The trainer's gradients and moments must exist by now.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    most = engine_bytes(model.config, num_parameters, precision, num_sequences, tokens)
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    return share_of_gpu(free, total, most, largest)


def as_in_files(tensors, shapes):
    """Yield names and whole tensors as a checkpoint has them, which is what vLLM can load.

    In memory, transformers holds all experts of a layer in one tensor, for example. `tensors` by
    name, `shapes` is the model without memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in tensors.items():
        yield from revert_weight_conversion(shapes, {name: whole(tensor.detach())}).items()


def _set_environment():
    """What vLLM reads from the environment when it is imported and started."""
    # The engine in this process: weights need not be pickled
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # GiB of keys and values; vLLM would take most of the memory
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Its Triton kernels would compute float32 products in TF32, with 10 bits.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    # Nothing leaves the machine unasked.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VllmSampler(Sampler):
    """Continuous batching by an in-process vLLM engine.

    `model`, a directory or a name on the hub, and `revision` there, or "", give architecture and
    first weights. `eos_ids`, `max_tokens` and `temperature` are as in `TransformersSampler`;
    `precision`, "float32" or "bfloat16", is that of weights, cache and products. The engine
    reserves room for `longest_prompt` and `max_tokens` tokens per sequence. `beside` is the
    trainer's model if it computes in this process; on a GPU the engine then takes what memory it
    leaves, but no more than `num_sequences` sequences need, and can `sleep`. Raises `BadInput`
    where the engine cannot start, later `RunStopped` where it fails.
    """

    def __init__(
        self,
        model,
        revision,
        eos_ids,
        max_tokens,
        temperature,
        precision,
        longest_prompt,
        beside=None,
        num_sequences=None,
    ):
        self.eos_ids = set(eos_ids)
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.precision = precision
        self.can_sleep = beside is not None and beside.device.type == "cuda"
        self.asleep = False
        self.room = max(longest_prompt + max_tokens, 64)  # `verify`'s probe needs some in any case
        self.heartbeat = torch.zeros(1, dtype=torch.int64)  # grows per engine step, tensor loaded

        _set_environment()
        options = self._options_beside(beside, num_sequences)
        try:
            self.shapes = shapes_of(model, revision)
            self.llm = self._start(model, revision, options)
            self.score([[0, 0]])  # some failures show only with the first request
        except Exception as error:  # as varied as models, memories and machines
            how = (
                "give one that vLLM supports and that fits (VLLM_CPU_KVCACHE_SPACE on a CPU), "
                "or leave --engine out"
            )
            raise BadInput(
                f"--engine vllm cannot start with this model ({_reason(error)}): {how}."
            ) from error

    def _options_beside(self, beside, num_sequences):
        """Options of an engine that shares its process with a trainer's model, if not None."""
        options = {}
        if self.can_sleep:
            options["enable_sleep_mode"] = True
            share = _share_beside(beside, self.precision, num_sequences, self.room)
            options["gpu_memory_utilization"] = share
        if beside is not None and size() > 1:
            # Several engines, one per rank, that share the ranks' process group
            options["distributed_executor_backend"] = "external_launcher"
        return options

    def _start(self, model, revision, options):
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        return LLM(
            model=model,
            revision=revision or None,
            skip_tokenizer_init=True,
            dtype=self.precision,
            max_model_len=self.room,
            use_tqdm_on_load=False,
            # Not the checkpoint's, which may switch on top-p or penalties
            generation_config="vllm",
            # As the trainer has it: logits rounded to bf16 would be up to 0.06 nats off. In bf16 on
            # a CPU, the mean mismatch of SmolLM2-135M falls from 0.053 to 0.045 nats.
            hf_overrides={"head_dtype": "float32"},
            # After the temperature
            logprobs_mode="processed_logprobs",
            # Or a step may be under way when weights are exchanged. (No CPU engine does this.)
            async_scheduling=False,
            # On a CPU compiling costs 30 s, and saves a tenth of the time.
            enforce_eager=on_cpu,
            # Where a step ends within a prompt, the state of a request's random generator is set
            # back, which a CPU's generator does not allow.
            enable_chunked_prefill=not on_cpu,
            **options,
        )

    def sample(self, prompts, group_size, seeds, problems=None):
        (samples,) = self.sample_many([(prompts, seeds, problems)], group_size)
        return samples

    def greedy(self, prompts, problems=None):
        """As in `Sampler`, but log-probs are at temperature 1.

        vLLM's greedy decoding reports no others.
        """
        entries = self._entries(prompts, 1, [None] * len(prompts), problems)
        found = dict(self._answered(entries, 0.0))
        return _joined(found[number] for number in range(len(entries)))

    def sample_many(self, requests, group_size):
        """All requests at once: the engine fills the tail of one batch with the next.

        To be read to the end.
        """
        entries = []
        parts = []  # the places of each request in `entries`
        for prompts, seeds, problems in requests:
            first = len(entries)
            entries += self._entries(prompts, group_size, seeds, problems)
            parts.append(range(first, len(entries)))
        done = {}
        for number, responses in self._answered(entries, self.temperature):
            done[number] = responses
            while parts and all(i in done for i in parts[0]):
                yield _joined(done.pop(i) for i in parts.pop(0))

    def _entries(self, prompts, group_size, seeds, problems):
        """What is to be answered: a list of (prompt, seed, number of responses, problem).

        Of several turns, the responses of a group go on at different times: one by one.
        """
        if self.environment is None:
            return [(*pair, group_size, None) for pair in zip(prompts, seeds, strict=True)]
        one_by_one = []
        for prompt, seed, problem in zip(prompts, seeds, problems, strict=True):
            for i in range(group_size):
                own_seed = None if seed is None else seed + i
                one_by_one.append((prompt, own_seed, 1, problem))
        return one_by_one

    def _answered(self, entries, temperature):
        """Yields pairs (position in `entries`, responses), the first done first.

        A response is a triple: tokens, log-probs, whether it was cut.
        """
        if self.environment is not None:
            yield from self._in_turns(entries, temperature)
            return
        requests = [
            (prompt, self._params(count, temperature, seed)) for prompt, seed, count, _ in entries
        ]
        for number, output in self._run(requests):
            yield number, self._responses(output)

    def _in_turns(self, entries, temperature):
        """`_answered` with an environment. Each turn is a request: its prompt is all that was said.

        vLLM finds keys and values of that in its cache.
        """
        said = [([], []) for _ in entries]  # tokens and log-probs so far
        requests = []
        entry_of = []  # of each request

        def ask(number):
            prompt, seed, _, _ = entries[number]
            tokens, _ = said[number]
            if seed is not None:
                seed = int(np.random.default_rng([seed, len(tokens)]).integers(2**62))
            params = self._params(1, temperature, seed)
            params.max_tokens -= len(tokens)
            requests.append((prompt + tokens, params))
            entry_of.append(number)

        for number in range(len(entries)):
            ask(number)
        for outputs in self._steps(requests):
            complete = []
            for position, output in outputs:
                number = entry_of[position]
                ((turn, logprobs, cut),) = self._responses(output)
                said[number][0].extend(turn)
                said[number][1].extend(logprobs)
                if cut:
                    yield number, [(*said[number], True)]
                else:
                    complete.append(number)
            problems = [entries[number][3] for number in complete]
            responses = [said[number] for number in complete]
            rooms = [self.max_tokens - len(tokens) for tokens, _ in responses]
            replies = self.environment.replies(problems, responses, rooms, self.heartbeat)
            for number, reply in zip(complete, replies, strict=True):
                if reply:
                    said[number][0].extend(reply)
                    said[number][1].extend([None] * len(reply))
                    ask(number)
                else:
                    yield number, [(*said[number], reply is None)]

    def score(self, sequences):
        """Log-probs, at temperature 1, of all tokens but each sequence's first: a list of lists."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = dict(self._run([(sequence, params) for sequence in sequences]))
        return [list(outputs[i].prompt_logprobs.logprobs) for i in range(len(sequences))]

    def use_weights(self, tensors):
        """Copy new weights, by parameter name, and forget what was computed with old ones.

        A sleeping engine wakes up.
        """

        def stream():
            for name_and_tensor in as_in_files(tensors, self.shapes):
                self.heartbeat += 1
                yield name_and_tensor

        unread = stream()
        self.checksums = None
        with _or_stop("did not take new weights"):
            if self.asleep:
                # PyTorch keeps the memory of freed tensors, which the engine could not have.
                torch.cuda.empty_cache()
                # Weights only: there is room for keys and values once loading has freed its own.
                self.llm.wake_up(["weights"])
            heads = self.llm.apply_model(_packed_head)
            self.llm.apply_model(_unpack_experts)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": unread})
            self.llm.apply_model(lambda model: _repack_tied_head(model, heads[0]))
            if self.asleep:
                self.llm.wake_up(["kv_cache"])
        self.asleep = False
        left = [name for name, _ in unread]
        if left:
            raise RunStopped(
                f"The vLLM engine left {len(left)} tensors unread, {left[0]} first: "
                "use another --engine."
            )
        if not self.llm.reset_prefix_cache():
            raise RunStopped(
                "The vLLM engine could not forget keys and values of old weights: "
                "requests are running."
            )

    def sleep(self):
        """Discard weights, keys and values, without a backup.

        `use_weights` must come before anything else.
        """
        if self.can_sleep and not self.asleep:
            with _or_stop("did not fall asleep"):
                self.llm.sleep(level=2)
            self.asleep = True
            self.checksums = None

    def _params(self, group_size, temperature, seed):
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        vocab_size = self.llm.llm_engine.model_config.get_vocab_size()
        known_eos_ids = [token for token in sorted(self.eos_ids) if token < vocab_size]
        return SamplingParams(
            n=group_size,
            temperature=temperature,
            seed=seed,  # the group's i-th response gets seed + i
            max_tokens=self.max_tokens,
            stop_token_ids=known_eos_ids,  # vLLM refuses others
            ignore_eos=True,  # the ids above are all there are
            logprobs=0,  # of the sampled token, and of no others: a flat list of them
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, requests):
        """Put requests, pairs (prompt, parameters), into the engine.

        Yields pairs (position in `requests`, output), the first done first.
        """
        return itertools.chain.from_iterable(self._steps(requests))

    def _steps(self, requests):
        """The outputs of `_run`, in a list for each of the engine's steps. In between, more may be
        appended to `requests`.
        """
        engine = self.llm.llm_engine
        added = 0
        with progress(None, "prompts answered", len(requests)) as bar:
            while added < len(requests) or engine.has_unfinished_requests():
                with _or_stop("refused a prompt"):
                    self._add(requests[added:], added)
                added = len(requests)
                with _or_stop("failed"):
                    outputs = engine.step()
                self.heartbeat += 1
                bar.update(len(outputs))
                yield [(int(output.request_id), output) for output in outputs]

    def _add(self, requests, first):
        for number, (prompt, params) in enumerate(requests, start=first):
            # vLLM would cut the response short without a word.
            if len(prompt) + params.max_tokens > self.room:
                raise ValueError(f"{len(prompt)} tokens are more than was reserved room for")
            self.llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    def _responses(self, output):
        """Of one request: a list of triples, tokens, log-probs and whether the response was cut."""
        found = []
        for one in sorted(output.outputs, key=lambda one: one.index):
            tokens = list(one.token_ids)
            found.append((tokens, list(one.logprobs.logprobs), tokens[-1] not in self.eos_ids))
        return found


def _joined(several):
    """`Samples` of several lists of responses, which are triples."""
    samples = Samples([], [], [])
    for tokens, logprobs, truncated in itertools.chain.from_iterable(several):
        samples.responses.append(tokens)
        samples.logprobs.append(logprobs)
        samples.truncated.append(truncated)
    return samples


def _packed_head(model):
    """The packed copy of the output head's weights that vLLM computes with on a CPU; else None.

    It is made after loading. A head tied to the embeddings owns no weights, so that reloading
    passes it over, and its packed copy silently stays the old one. So the head is packed again
    wherever a reload has left the very same copy in place.
    """
    return getattr(getattr(model, "lm_head", None), "cpu_linear", None)


def _repack_tied_head(model, before):
    if before is not None and _packed_head(model) is before:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _unpack_experts(model):
    """Let a reload pack the experts' weights, too, for the products of vLLM's CPU engine.

    It would pack them only where there is no kernel yet, and compute with unpacked ones.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel") and next(module.parameters()).device.type == "cpu":
            method.moe_kernel = None


@contextmanager
def _or_stop(what):
    """Context whose errors become `RunStopped`, which says what the engine did."""
    try:
        yield
    except Exception as error:
        raise RunStopped(
            f"The vLLM engine {what} ({_reason(error)}): continue with --resume."
        ) from error


def _reason(error):
    """The first cause, shortened.

    vLLM wraps exceptions several times, and quotes whole configurations.
    """
    while cause := error.__cause__ or error.__context__:
        error = cause
    on_one_line = " ".join(str(error).split())
    return f"{type(error).__name__}: {on_one_line[:300]}"
