"""Live Megatron-Core models on gloo ranks: load, stream out, save, in every layout.

Starting ranks costs far more than the work, so one set of ranks goes through all layouts.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_bpdg.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_bpdg.checkpoint.mapping import LM_HEAD, MappingError
from tests.checkpoint_fixtures import compare_hf, save_tiny_moe, save_tiny_qwen3
from tests.parallel.spawn import run_ranks

# (tensor parallel, pipeline parallel, tied); on 4 ranks the rest is data parallel.
LAYOUTS = [(1, 1, True), (2, 1, False), (4, 1, True), (4, 1, False), (1, 2, True), (2, 2, True), (2, 2, False)]

# (key of MODELS; tensor parallel, pipeline parallel, virtual stages, expert parallel, expert tensor parallel)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"tied": False},
    "mixed": {"tied": True, "mlp_only_layers": [1]},
}
EXPERT_LAYOUTS = [
    ("experts", 1, 1, 1, 4, 1),
    ("experts", 2, 1, 1, 2, 1),
    ("experts", 2, 1, 1, 2, 2),
    ("experts", 2, 2, 1, 1, 2),
    ("experts", 1, 2, 2, 2, 1),
    ("mixed", 1, 2, 1, 2, 1),
    ("dense", 2, 2, 2, 1, 2),
]


def _model(hf: Path, tp: int, pp: int, vocab_multiple: int = 1) -> list[Any]:
    """This rank's chunk, every parameter NaN, so that an unfilled one cannot pass for a loaded one."""
    from megatron.core import parallel_state

    from megatron_bpdg.config.layout import Layout
    from megatron_bpdg.models import qwen3
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.parallel.platform import enable_cpu_platform
    from megatron_bpdg.parallel.world import destroy_model_parallel

    enable_cpu_platform()
    destroy_model_parallel(keep=[dist.distributed_c10d._get_default_group()])
    gc.collect()
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    multiple = tp * vocab_multiple
    qwen3.padded_vocab_size = lambda size, tp: -(-size // multiple) * multiple
    layout = Layout(tensor_parallel=tp, pipeline_parallel=pp)
    model = qwen3.build_model(qwen3.ModelShape.from_hf(read_hf_config(hf)), layout, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return [model]


def _export(chunks: list[Any], hf: Path) -> dict[str, torch.Tensor]:
    from megatron_bpdg.checkpoint.live import iter_hf_weights
    from megatron_bpdg.models.hf_config import read_hf_config

    exported: dict[str, torch.Tensor] = {}
    for name, tensor in iter_hf_weights(chunks, read_hf_config(hf)):
        assert name not in exported
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        exported[name] = tensor
    return exported


def _assert_equals_source(chunks: list[Any], hf: Path) -> None:
    expected = load_file(hf / "model.safetensors")
    exported = _export(chunks, hf)
    assert set(exported) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), name


def _load_with_megatron_core(chunks: list[Any], checkpoint: Path) -> None:
    """Megatron-Core's own loader with its default strictness, extra states included."""
    from megatron.core import dist_checkpointing

    wanted = {f"model{number}": chunk.sharded_state_dict(metadata={}) for number, chunk in enumerate(chunks)}
    state = dist_checkpointing.load(dict(wanted), str(checkpoint / "release"))
    assert state["args"].num_layers == 4
    assert state["checkpoint_version"] == 3.0
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"])


def _every_layout(work: Path) -> list[list[str]]:
    """In each layout: load from HF, from our torch_dist with both loaders, and from Megatron's own save."""
    from megatron_bpdg.checkpoint.live import load_weights, save_hf, save_weights

    orders = []
    for tp, pp, tied in LAYOUTS:
        hf, megatron, saved = work / f"hf-{tied}", work / f"megatron-{tied}", work / f"saved-{tp}-{pp}-{tied}"
        chunks = _model(hf, tp, pp)
        load_weights(chunks, hf)
        _assert_equals_source(chunks, hf)
        save_weights(chunks, saved, hf, iteration=7)
        save_hf(chunks, hf, saved / "exported")
        chunks = _model(hf, tp, pp, vocab_multiple=5)  # other padding than was saved
        load_weights(chunks, megatron)
        _assert_equals_source(chunks, hf)
        chunks = _model(hf, tp, pp, vocab_multiple=5)
        load_weights(chunks, saved)
        _assert_equals_source(chunks, hf)
        chunks = _model(hf, tp, pp)
        _load_with_megatron_core(chunks, megatron)
        _assert_equals_source(chunks, hf)
        orders.append(list(_export(chunks, hf)))
    return orders


def test_every_layout_round_trips(tmp_path: Path) -> None:
    for tied in (True, False):
        hf_to_megatron(save_tiny_qwen3(tmp_path / f"hf-{tied}", tied=tied), tmp_path / f"megatron-{tied}")
    orders = run_ranks(_every_layout, 4, tmp_path)
    assert all(order == orders[0] for order in orders)
    for tp, pp, tied in LAYOUTS:
        source, saved = tmp_path / f"hf-{tied}", tmp_path / f"saved-{tp}-{pp}-{tied}"
        assert compare_hf(source, saved / "exported") == [], (tp, pp, tied)
        # Megatron's own save, of any layout and padding, through the offline reader.
        assert compare_hf(source, megatron_to_hf(saved, saved / "offline")) == [], (tp, pp, tied)


def _stages(hf: Path, tp: int, pp: int, virtual: int, ep: int, etp: int) -> list[Any]:
    """This rank's chunks, one per virtual stage, every parameter NaN."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_bpdg.config.layout import Layout
    from megatron_bpdg.models import qwen3
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.models.specs import RMSNorm, block_spec, torch_layer_spec
    from megatron_bpdg.parallel.platform import enable_cpu_platform
    from megatron_bpdg.parallel.world import destroy_model_parallel

    enable_cpu_platform()
    destroy_model_parallel(keep=[dist.distributed_c10d._get_default_group()])
    gc.collect()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    layout = Layout(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=4 // tp // pp,
        sequence_parallel=tp > 1,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
    )
    shape = qwen3.ModelShape.from_hf(read_hf_config(hf))
    config = qwen3.transformer_config(shape, layout, torch.float32)
    spec = block_spec(config)
    if virtual > 1:
        config.virtual_pipeline_model_parallel_size = virtual
        layer = torch_layer_spec(experts=shape.experts is not None)
        count = shape.num_hidden_layers // pp // virtual
        spec = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = [
        GPTModel(
            config,
            spec,
            qwen3.padded_vocab_size(shape.vocab_size, tp),
            shape.max_position_embeddings,
            pre_process=(rank, stage) == (0, 0),
            post_process=(rank, stage) == (pp - 1, virtual - 1),
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=stage if virtual > 1 else None,
        )
        for stage in range(virtual)
    ]
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks


def _every_expert_layout(work: Path) -> None:
    from megatron_bpdg.checkpoint.live import load_weights, save_weights

    for name, *sizes in EXPERT_LAYOUTS:
        hf = work / name
        chunks = _stages(hf, *sizes)
        _load_with_megatron_core(chunks, work / f"{name}-megatron")
        _assert_equals_source(chunks, hf)
        saved = work / "-".join(map(str, (name, *sizes)))
        save_weights(chunks, saved, hf, iteration=7)
        for checkpoint in (hf, saved):
            chunks = _stages(hf, *sizes)
            load_weights(chunks, checkpoint)
            _assert_equals_source(chunks, hf)


def test_experts_and_virtual_stages_round_trip(tmp_path: Path) -> None:
    """Megatron-Core loads what the converter wrote, and the converter reads what Megatron-Core saved."""
    for name, fields in MODELS.items():
        save = save_tiny_qwen3 if name == "dense" else save_tiny_moe
        hf = save(tmp_path / name, **({"tied": True, "num_hidden_layers": 4} | fields))
        hf_to_megatron(hf, tmp_path / f"{name}-megatron")
    run_ranks(_every_expert_layout, 4, tmp_path)
    for name, *sizes in EXPERT_LAYOUTS:
        saved = tmp_path / "-".join(map(str, (name, *sizes)))
        assert compare_hf(tmp_path / name, megatron_to_hf(saved, saved / "offline")) == [], (name, sizes)


def _tied_student_untied_teacher(student: Path, teacher: Path) -> list[dict[str, torch.Tensor]]:
    from megatron_bpdg.checkpoint.live import load_weights

    models = [(_model(path, 2, 1), path) for path in (teacher, student)]
    for chunks, path in reversed(models):
        load_weights(chunks, path)
    return [_export(chunks, path) for chunks, path in models]


def test_a_tied_student_leaves_the_untied_teachers_head_alone(tmp_path: Path) -> None:
    student = save_tiny_qwen3(tmp_path / "student", tied=True, seed=1)
    teacher = save_tiny_qwen3(tmp_path / "teacher", tied=False, seed=2)
    expected = load_file(teacher / "model.safetensors")
    for loaded_teacher, loaded_student in run_ranks(_tied_student_untied_teacher, 2, student, teacher):
        assert torch.equal(loaded_teacher[LM_HEAD], expected[LM_HEAD])
        assert not torch.equal(loaded_teacher[LM_HEAD], expected["model.embed_tokens.weight"])
        assert LM_HEAD not in loaded_student


def _load_and_errors(hf: Path, other: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    from megatron_bpdg.checkpoint.live import load_weights, save_hf

    chunks = _model(hf, 1, 2)
    messages = []
    for bad in (other, hf.parent / "nothing"):
        try:
            load_weights(chunks, bad)
        except (MappingError, FileNotFoundError) as error:
            messages.append(str(error))
    load_weights(chunks, hf)
    try:
        save_hf(chunks, hf, other)
    except FileExistsError as error:
        messages.append(str(error))
    return _export(chunks, hf), messages


def test_errors_are_those_of_every_rank(tmp_path: Path) -> None:
    hf = save_tiny_qwen3(tmp_path / "source", tied=True)
    other = save_tiny_qwen3(tmp_path / "other", tied=True, intermediate_size=40, num_hidden_layers=5)
    expected = load_file(hf / "model.safetensors")
    for exported, messages in run_ranks(_load_and_errors, 2, hf, other):
        for name, tensor in expected.items():
            assert torch.equal(exported[name], tensor), name
        misfit, absent, occupied = messages
        assert "missing decoder.layers.4.mlp.linear_fc1.weight" in misfit
        for layer in (0, 3):  # both stages' problems, on both ranks
            assert f"wrong   decoder.layers.{layer}.mlp.linear_fc1.weight: shape (96, 32)" in misfit
        assert "nothing is not a directory" in absent
        assert "other exists" in occupied


def _chunks_out_of_order(hf: Path) -> None:
    """Two virtual chunks whose layers interleave, told apart by layer_number alone."""
    from megatron_bpdg.checkpoint.live import load_weights

    (model,) = _model(hf, 1, 1)
    chunks = []
    for layers in ((0, 3), (1, 2)):
        chunk = copy.copy(model)
        chunk._modules = dict(model._modules)
        chunk.decoder = copy.copy(model.decoder)
        chunk.decoder._modules = dict(model.decoder._modules)
        chunk.decoder.layers = torch.nn.ModuleList([model.decoder.layers[i] for i in layers])
        chunks.append(chunk)
    del chunks[1].embedding, chunks[1].output_layer
    chunks[1].decoder.final_layernorm = None
    load_weights(chunks, hf)
    _assert_equals_source(chunks, hf)
    _assert_equals_source([model], hf)


def test_layer_numbers_not_positions_name_the_layers(tmp_path: Path) -> None:
    run_ranks(_chunks_out_of_order, 1, save_tiny_qwen3(tmp_path / "source", tied=False))
