"""What goes with a checkpoint into a new folder, and what stays behind."""

import json
import shutil
import warnings

import pytest
from safetensors.torch import save_file

from moe_precision.checkpoints import load_model
from moe_precision.checkpoints.other_files import copy_other_files
from moe_precision.quantize.writer import distill_checkpoint, quantize_checkpoint
from tests.support.checkpoints import save_float
from tests.support.models import logits

BELONGS = {
    "tokenizer.json": "{}",
    "tokenizer.model": "sentencepiece",
    "generation_config.json": '{"bos_token_id": 0}',
    "modeling_mine.py": "x = 1",
    "spk_dict.pt": "a speaker",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 64}',
    "2_Dense/model.safetensors": "weights of the pipeline",
    "assets/deep/er/picture.png": "a picture",
    "speech_tokenizer/config.json": '{"model_type": "another"}',
    "speech_tokenizer/model.safetensors": "weights of a part",
}
WRONG = {
    "adapter_config.json": '{"base_model_name_or_path": "elsewhere"}',
    "adapter_model.safetensors": "an adapter",
    "model.Q4_K_M.gguf": "stray",
    "model.onnx": "stray",
    "pytorch_model.bin": "stray",
    "pytorch_model.bin.index.json": "{}",
    "consolidated.00.pth": "stray",
    "consolidated.safetensors": "stray",
    "training_args.bin": "of a run",
    "optimizer.pt": "of a run",
    "quantize_config.json": "{}",
    "hf_quant_config.json": "{}",
    "original/params.json": "{}",
    "original/consolidated.00.pth": "the model again",
    "onnx/model.onnx": "the model again",
    "checkpoint-5/config.json": "{}",
    "checkpoint-5/model.safetensors": "an earlier moment",
    "best/trainer_state.json": "{}",
    "best/model.safetensors": "an earlier moment",
    "again/config.json": '{"model_type": "mixtral"}',
    "again/model.safetensors": "the model again",
    "2_Dense/model.gguf": "stray",
    ".cache/huggingface/download/x.lock": "of a tool",
    ".git/config": "of a tool",
    "__pycache__/modeling_mine.cpython-311.pyc": "of a tool",
}


def put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path):
    model, plan, source, out = save_float(tmp_path)
    own = files_in(source)
    put(source, BELONGS | {name: text for name, text in WRONG.items() if not name.startswith("adapter_")})
    return model, plan, source, out, own


@pytest.mark.slow
def test_quantizing_takes_along_what_belongs_to_the_model(saved):
    _, plan, source, out, _ = saved
    with pytest.warns(
        UserWarning, match=r"left out, as weights of another kind.*checkpoint-5/.*model.Q4_K_M.gguf.*pytorch_model.bin"
    ):
        quantize_checkpoint(source, plan, out)
    assert files_in(out) == {"config.json", "model.safetensors", "README.md", *BELONGS}  # its own card
    assert {name: (out / name).read_text() for name in BELONGS} == BELONGS
    assert load_model(out).is_quantized


@pytest.mark.slow
def test_an_adapter_stays_behind_and_is_named(saved):
    _, plan, source, out, _ = saved
    put(source, {name: text for name, text in WRONG.items() if name.startswith("adapter_")})
    with pytest.warns(UserWarning, match=r"holds an adapter, which was left out.*merge it first"):
        quantize_checkpoint(source, plan, out)
    assert not list(out.glob("adapter*"))
    assert logits(load_model(out)).isfinite().all()


@pytest.mark.slow
def test_distilling_takes_along_the_same(saved, tmp_path):
    model, plan, source, out, _ = saved
    with pytest.warns(UserWarning, match="left out"):
        quantize_checkpoint(source, plan, out)
    batches = [{"input_ids": model.dummy_inputs["input_ids"]} for _ in range(10)]
    distill_checkpoint(source, out, tmp_path / "distilled", batches, steps=1)
    assert files_in(tmp_path / "distilled") == files_in(out)
    assert json.loads((tmp_path / "distilled" / "1_Pooling" / "config.json").read_text())


def test_a_plain_folder_warns_of_nothing(tmp_path):
    _, _, source, out = save_float(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy_other_files(source, out)
    assert files_in(out) == {"generation_config.json"}


def test_nothing_is_written_over_and_links_end(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    put(source, {"config.json": "{}", "a.txt": "theirs", "part/b.txt": "theirs"})
    put(source, {"one/c.txt": "1", "two/d.txt": "2"})
    (source / "part" / "round").symlink_to(source, target_is_directory=True)
    (source / "part" / "itself").symlink_to(source / "part", target_is_directory=True)
    (source / "one" / "two").symlink_to(source / "two", target_is_directory=True)
    (source / "two" / "one").symlink_to(source / "one", target_is_directory=True)
    (source / "linked.txt").symlink_to(source / "a.txt")
    (source / "gone.txt").symlink_to(source / "nowhere")
    put(out, {"a.txt": "ours"})
    copy_other_files(source, out)
    found = {"a.txt", "part/b.txt", "linked.txt", "one/c.txt", "one/two/d.txt", "two/d.txt", "two/one/c.txt"}
    assert files_in(out) == found
    assert (out / "a.txt").read_text() == "ours"
    assert not (out / "linked.txt").is_symlink()
    shutil.rmtree(source)
    assert (out / "linked.txt").read_text() == "theirs"


def test_files_of_other_runtimes_are_no_weights_of_the_checkpoint(tmp_path):
    """A folder whose part holds real weights under names of its own is copied whole."""
    import torch

    source, out = tmp_path / "source", tmp_path / "out"
    put(source, {"config.json": '{"model_type": "mixtral"}', "vision/config.json": '{"model_type": "clip"}'})
    save_file({"weight": torch.zeros(2)}, source / "vision" / "model.safetensors")
    copy_other_files(source, out)
    assert files_in(out) == {"vision/config.json", "vision/model.safetensors"}
