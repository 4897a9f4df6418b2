"""Models that transformers or FSDP2 splits over two CPU processes: norms and loads are right, packing is refused."""

import socket

import pytest
import torch

from moe_precision import PrecisionPlan, allocate, find_moe_layers, quantize_model
from moe_precision.checkpoints import load_model
from moe_precision.recording.loads import LoadCounter
from moe_precision.recording.router_norms import max_variances, norms_by_layer
from tests.support import parallel_run
from tests.support.models import build, logits
from tests.support.processes import finish, start


def on_two_processes(folder, function, *arguments):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    logs = [folder / f"rank_{rank}.txt" for rank in (0, 1)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        start(function, str(folder), *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, log in enumerate(logs)
    ]
    finish(*ranks, logs=logs, seconds=120)


@pytest.fixture
def folders(tmp_path):
    """A float checkpoint, a plan and a packed checkpoint."""
    model = build("qwen3_moe", num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    plan.save(tmp_path / "plan.json")
    quantize_model(build("qwen3_moe", num_experts_per_tok=2), plan).save_pretrained(tmp_path / "packed")
    return tmp_path, model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "sizes", "batches"),
    [
        ("tp", "tp_size=2", 1),
        pytest.param("ep", "tp_size=2, ep_size=2", 1, marks=pytest.mark.thorough),
        ("ep_of_own_batches", "ep_size=2, fsdp_size=2", 2),
        pytest.param("fsdp", "fsdp_size=2", 2, marks=pytest.mark.thorough),
    ],
)
def test_split_models(split, sizes, batches, folders):
    folder, model = folders
    on_two_processes(folder, parallel_run.main, split)
    layers = find_moe_layers(model)
    norms, variances = norms_by_layer(layers), {layer.name: max_variances(layer) for layer in layers}
    counter = LoadCounter(layers, model)
    expected = logits(model)
    loads = counter.take(training=True)
    plan = allocate(model, method="weight_error", average_bits=3, bits=(2, 4), group_size=32)
    curvature = parallel_run.curvature_of_a_step(model)
    for rank in (0, 1):
        found = torch.load(folder / f"{split}_{rank}.pt", weights_only=False)
        *packed, live = found["refusals"]
        for text in packed:
            assert text.startswith(f"QuantizationError: the model is to be split over processes ({sizes}), and packed")
        assert live.startswith("QuantizationError: ")
        assert "split over processes" in live
        torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-4)  # float models run as they did
        assert found["counted"]["model.layers.0.mlp"][0].sum() == batches * 87 * 2  # tokens, experts per token
        assert PrecisionPlan.from_dict(found["plan"]).diff(plan) == []
        for name in norms:
            torch.testing.assert_close(found["norms"][name], norms[name])
            torch.testing.assert_close(found["variances"][name], variances[name])
            for kind in ("rows", "columns"):
                means = (getattr(one, kind)[name] for one in (found["curvature"], curvature))
                torch.testing.assert_close(*means, rtol=1e-4, atol=0)
            assert torch.equal(found["loads"][name][0], batches * loads[name][0])  # both ranks have the same batch


@pytest.mark.slow
def test_half_the_layers_are_no_model(folders):
    folder, _ = folders
    on_two_processes(folder, parallel_run.pipeline)
    for rank in (0, 1):
        assert "by pipeline parallelism (pp_size=2), so that this one" in torch.load(folder / f"pipeline_{rank}.pt")


@pytest.mark.slow
def test_a_packed_model_under_fsdp2_is_saved_whole(folders):
    folder, _ = folders
    on_two_processes(folder, parallel_run.packed_under_fsdp2)
    expected = load_model(folder / "packed").state_dict()
    for name in ("own", "given"):
        found = load_model(folder / name).state_dict()  # every checksum is right
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_which_processes_share_a_batch(tmp_path):
    on_two_processes(tmp_path, parallel_run.meshes)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"meshes_{rank}.pt") == {
            (1, 2, False): 2,  # data parallel, tensor parallel, FSDP2
            (1, 2, True): 2,
            (2, 1, False): 1,  # DDP
            (2, 1, True): 1,
            None: 2,
            ("model",): 2,
        }
