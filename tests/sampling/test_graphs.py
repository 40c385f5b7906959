"""Sampling for GPUs, on a CPU: static buffers, sizes and looks are the same, only nothing is
recorded.
"""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import RunStopped
from common.lora import add_adapter, trainable
from common.models import load_model
from common.sampling import graphs
from common.sampling.graphs import GraphSampler, can_use_graphs, halved, room_for
from common.sampling.transformers import TransformersSampler
from common.sampling.verify import sampler_mismatch
from common.weights import weights_of
from tests.conftest import build_model
from tests.sampling.test_model_families import FAMILIES, PROMPTS, SIZES, build

SEEDS = [0, 10, 20, 30]
ENDS = set(range(0, 300, 10))  # every tenth token ends a response
WINDOW, EXPERTS, STATES = "a sliding window", "experts", "recurrent states"
ATTENTION = "attention that is not PyTorch's"
NOT_RECORDED = {
    **dict.fromkeys(("mistral", "ministral", "gemma2", "gemma3_text", "gemma3"), WINDOW),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "olmo3", "cohere2", "exaone4"), WINDOW),
    "gpt_oss": WINDOW,
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe"), EXPERTS),
    **dict.fromkeys(("granitemoe", "deepseek_v2", "deepseek_v3", "glm4_moe"), EXPERTS),
    **dict.fromkeys(("ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2"), EXPERTS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "bamba"), STATES),
    **dict.fromkeys(("falcon_h1", "lfm2", "lfm2_moe", "granitemoehybrid"), STATES),
    **dict.fromkeys(("nemotron_h", "jamba"), STATES),
    **dict.fromkeys(("gptj", "bloom", "mpt"), ATTENTION),
}


def load(directory):
    return load_model(directory, "", torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(build_model("qwen2", tmp_path_factory.mktemp("qwen2")))


def assert_equal(samples, expected):
    assert samples.responses == expected.responses
    assert samples.truncated == expected.truncated
    for row, other in zip(samples.logprobs, expected.logprobs, strict=True):
        assert row == pytest.approx(other, abs=2e-5)


# What a graph cannot record: a value that the CPU asks for, and a tensor made of a Python number,
# which is copied to the GPU.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "_unique2", "isin", "lift_fresh")


def forbidden_operations(sampler, monkeypatch):
    """A list of the forbidden operations that the sampler's tokens will need."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in FORBIDDEN:
                found.append(name)
            return function(*args, **(kwargs or {}))

    decode = sampler._decode_token

    def watched(rows, greedy):
        with Watch():
            decode(rows, greedy)

    monkeypatch.setattr(sampler, "_decode_token", watched)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_path_it_can(family, tmp_path, monkeypatch):
    model = load(build(family, tmp_path / "model", FAMILIES[family]))
    assert can_use_graphs(model) == (family not in NOT_RECORDED)
    if NOT_RECORDED.get(family) in (WINDOW, STATES):
        return  # its cache does not fit into the buffers
    plain, static = (cls(model, ENDS, 24, 1.0) for cls in (TransformersSampler, GraphSampler))
    forbidden = forbidden_operations(static, monkeypatch)
    assert_equal(static.sample(PROMPTS, 3, SEEDS), plain.sample(PROMPTS, 3, SEEDS))
    assert_equal(static.greedy(PROMPTS), plain.greedy(PROMPTS))
    assert forbidden == [] or family in NOT_RECORDED


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "bloom", "mpt", "gptj"])
def test_positions_of_every_kind_work_with_unfilled_columns(family, tmp_path, monkeypatch):
    heads = {"n_layers": 2, "n_heads": 2, "n_layer": 2, "n_head": 2, "rotary_dim": 16}
    widths = {"d_model": 64, "n_embd": 64, "ffn_dim": 96, "word_embed_proj_dim": 64}
    model = load(build(family, tmp_path / "model", SIZES | heads | widths | {"max_seq_len": 128}))
    plain, static = (cls(model, ENDS, 24, 1.0) for cls in (TransformersSampler, GraphSampler))
    forbidden = forbidden_operations(static, monkeypatch)
    assert_equal(static.sample(PROMPTS, 3, SEEDS), plain.sample(PROMPTS, 3, SEEDS))
    # The last three have attention of their own.
    assert can_use_graphs(model) == (forbidden == []) == (family in ("gpt_neox", "opt"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_not_recorded(kind, tmp_path):
    more = {"dynamic": {"factor": 2.0}, "longrope": {
        "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 2.0,
        "original_max_position_embeddings": 64}}[kind]  # fmt: skip
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **more}
    family = {"dynamic": "llama", "longrope": "phi3"}[kind]
    model = load(build(family, tmp_path / "model", {"rope_parameters": parameters}))
    assert not can_use_graphs(model)


def test_sizes():
    assert [room_for(n) for n in (1, 64, 65, 512, 513, 1024, 1025, 2049)] == [
        64, 64, 128, 512, 640, 1024, 1280, 2560]  # fmt: skip
    assert [halved(96, needed) for needed in (96, 49, 48, 24, 7, 3, 1)] == [
        96,
        96,
        48,
        24,
        12,
        3,
        1,
    ]
    assert halved(7, 3) == 4 and halved(1, 1) == 1


@pytest.mark.parametrize("looks, step", [(1, 4), (3, 8), (8, 16), (50, 64)])
def test_neither_sizes_nor_looks_change_what_is_sampled(looks, step, model, monkeypatch):
    monkeypatch.setattr(graphs, "TOKENS_PER_LOOK", looks)
    monkeypatch.setattr(graphs, "room_for", lambda columns: -(-columns // step) * step)
    expected = TransformersSampler(model, ENDS, 70, 1.0).sample(PROMPTS, 4, SEEDS)
    assert any(expected.truncated) or max(map(len, expected.responses)) > 30
    assert_equal(GraphSampler(model, ENDS, 70, 1.0).sample(PROMPTS, 4, SEEDS), expected)


def test_how_prompts_are_split_does_not_change_what_is_sampled(model, monkeypatch):
    sampler = GraphSampler(model, ENDS, 24, 1.0)
    together = sampler.sample(PROMPTS, 3, SEEDS)
    for most in (1, 6):
        monkeypatch.setattr(sampler, "_most_sequences", lambda prompts, most=most: most)
        assert_equal(sampler.sample(PROMPTS, 3, SEEDS), together)


def test_buffers_are_filled_again_with_new_weights(tmp_path):
    one, other = (load(build_model("qwen2", tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    expected = [
        TransformersSampler(m, ENDS, 24, 1.0).sample(PROMPTS, 3, SEEDS) for m in (one, other)
    ]
    assert expected[0].responses != expected[1].responses
    sampler = GraphSampler(one, ENDS, 24, 1.0)
    assert_equal(sampler.sample(PROMPTS, 3, SEEDS), expected[0])
    places = {name: tensor.data_ptr() for name, tensor in sampler.decoding.memory.items()}
    for own, new in zip(one.parameters(), other.parameters(), strict=True):
        own.data.copy_(new)  # in place, as an optimizer does it
    assert_equal(sampler.sample(PROMPTS, 3, SEEDS), expected[1])
    assert places == {name: tensor.data_ptr() for name, tensor in sampler.decoding.memory.items()}


def test_weights_that_are_handed_over_go_to_where_graphs_read_them(tmp_path):
    one, other = (load(build_model("qwen2", tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    places = [tensor.data_ptr() for tensor in weights_of(one).values()]
    sampler = GraphSampler(one, ENDS, 24, 1.0)
    sampler.use_weights(weights_of(other))
    assert [tensor.data_ptr() for tensor in weights_of(one).values()] == places
    expected = TransformersSampler(other, ENDS, 24, 1.0).sample(PROMPTS, 3, SEEDS)
    assert_equal(sampler.sample(PROMPTS, 3, SEEDS), expected)


def test_bf16_copies_get_the_new_weights_and_the_model_is_left_as_it_was(tmp_path):
    one, other = (load(build_model("llama", tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    before = one.config._attn_implementation
    sampler = GraphSampler(one, ENDS, 12, 1.0, "bfloat16")
    sampler.sample(PROMPTS, 2, SEEDS)
    for own, new in zip(one.parameters(), other.parameters(), strict=True):
        own.data.copy_(new)
    again = sampler.sample(PROMPTS, 2, SEEDS)
    assert_equal(again, GraphSampler(other, ENDS, 12, 1.0, "bfloat16").sample(PROMPTS, 2, SEEDS))
    assert one.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in one.modules())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_is_merged_where_graphs_read(precision, tmp_path):
    directory = build_model("qwen2", tmp_path / "model")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = load_model(directory, "", torch.device("cpu"), dtype=dtype)
    add_adapter(model, rank=4, alpha=8.0, seed=1)
    assert can_use_graphs(model)
    sampler = GraphSampler(model, ENDS, 24, 1.0, precision)
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    found = []
    for strength in (0.0, 0.2, 0.4):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.copy_(strength * torch.randn_like(parameter))
        samples = sampler.sample(PROMPTS, 3, SEEDS)
        if precision == "float32":
            assert_equal(
                samples, TransformersSampler(model, ENDS, 24, 1.0).sample(PROMPTS, 3, SEEDS)
            )
        batch = types.SimpleNamespace(
            prompts=[prompt for prompt in PROMPTS for _ in range(3)], **vars(samples)
        )
        mismatch = sampler_mismatch(model, 1.0, precision, batch, 12)["sampler_mismatch/mean"]
        assert mismatch < {"float32": 1e-5, "bfloat16": 0.1}[precision]
        found.append(samples.responses)
    assert found[0] != found[1] != found[2]
    assert places == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


def test_in_bf16_it_is_as_near_to_the_trainer_as_todays_path(model):
    gaps = []
    for cls in (TransformersSampler, GraphSampler):
        samples = cls(model, ENDS, 24, 1.0, "bfloat16").sample(PROMPTS, 4, SEEDS)
        prompts = [prompt for prompt in PROMPTS for _ in range(4)]
        batch = types.SimpleNamespace(prompts=prompts, **vars(samples))
        gaps.append(sampler_mismatch(model, 1.0, "bfloat16", batch)["sampler_mismatch/mean"])
    assert gaps[1] < 1.5 * gaps[0] + 1e-3, gaps


def test_all_rows_may_end_at_the_first_token_and_prompts_be_longer_than_a_size(model):
    everything = set(range(len(model.get_input_embeddings().weight)))
    long = [[5] * 200, [7] * 3]
    for ends, prompts in ((everything, PROMPTS), (ENDS, long), (everything, long)):
        plain, static = (cls(model, ends, 9, 1.0) for cls in (TransformersSampler, GraphSampler))
        seeds = SEEDS[: len(prompts)]
        assert_equal(static.sample(prompts, 3, seeds), plain.sample(prompts, 3, seeds))
    assert all(len(r) == 1 for r in static.sample(long, 3, [0, 10]).responses)
    assert_equal(
        GraphSampler(model, ENDS, 1, 1.0).greedy(PROMPTS),
        TransformersSampler(model, ENDS, 1, 1.0).greedy(PROMPTS),
    )


def test_many_rows_and_many_tokens(model):
    some_ends = {0, 60}
    plain, static = (cls(model, some_ends, 300, 1.0) for cls in (TransformersSampler, GraphSampler))
    seeds = [100 * n for n in range(4)]
    expected = plain.sample(PROMPTS, 24, seeds)
    assert 0 < sum(expected.truncated) < 24
    for _ in range(2):  # the first time, buffers grow
        assert_equal(static.sample(PROMPTS, 24, seeds), expected)
    rows, columns = ({size[place] for size in static.decoding.graphs} for place in (2, 3))
    assert len(rows) > 2 and len(columns) > 3


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    model = load(build_model("qwen2", tmp_path / "model"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RunStopped):
        GraphSampler(model, ENDS, 8, 1.0).sample(PROMPTS, 2, SEEDS)


def test_a_graph_is_recorded_the_second_time_and_never_for_other_tensors(model, monkeypatch):
    """The bookkeeping around graphs, with a recorder in place of CUDA's."""
    recorded, replayed = [], []

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            replayed.append(self)
            self.run()

    class Recording:
        def __init__(self, graph, pool):
            self.graph = graph

        def __enter__(self):
            recorded.append(self.graph)
            held = {name: place.data_ptr() for name, place in sampler.decoding.memory.items()}
            self.graph.held, self.graph.run = held, None

        def __exit__(self, *_):
            pass

    sampler = GraphSampler(model, ENDS, 40, 1.0)
    sampler.on_gpu = True
    monkeypatch.setattr(sampler, "_most_sequences", lambda prompts: 256)
    monkeypatch.setattr(sampler, "_num_bytes", lambda: 0)
    monkeypatch.setattr(graphs, "memory_of", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    decode = GraphSampler._decode_token

    def record_or_decode(self, rows, greedy):
        if recorded and recorded[-1].run is None:  # while recording, nothing is executed
            graph = recorded[-1]
            shape = (*rows.tokens_BT.shape, *rows.mask_RC.shape)

            def run():
                assert (*rows.tokens_BT.shape, *rows.mask_RC.shape) == shape
                now = {name: place.data_ptr() for name, place in rows.memory.items()}
                assert now == graph.held
                decode(self, rows, greedy)

            graph.run = run
            return
        decode(self, rows, greedy)

    monkeypatch.setattr(GraphSampler, "_decode_token", record_or_decode)
    plain = TransformersSampler(model, ENDS, 40, 1.0)
    for group_size in (4, 8, 4, 8, 2):  # larger buffers once, smaller batches in between
        expected = plain.sample(PROMPTS, group_size, SEEDS)
        assert_equal(sampler.sample(PROMPTS, group_size, SEEDS), expected)
        assert_equal(sampler.greedy(PROMPTS), plain.greedy(PROMPTS))
    assert len(replayed) > 5 * len(recorded) > 0


def test_the_real_model_is_not_needed_to_know_the_bytes(model):
    config = model.config
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * 32 * 4
    assert GraphSampler(model, ENDS, 8, 1.0).bytes_per_token == expected
    assert GraphSampler(model, ENDS, 8, 1.0, "bfloat16").bytes_per_token == expected // 2
