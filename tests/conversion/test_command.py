"""The command convert: its flags, the folders that it reads and writes, and its errors."""

import argparse
import json

import harness
import pytest
from conversion_cases import assert_refused, change, convert, read_hf, with_mtp_head, write_hf
from training import assert_equal

from hgrn2_megatron import UsageError


def test_ids_of_special_tokens_travel(tmp_path):
    source = write_hf(tmp_path / "hf", bos_token_id=5, eos_token_id=7, pad_token_id=9)
    back = convert(convert(source, tmp_path / "megatron"), tmp_path / "back")
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((back / file).read_text())
        assert [ids[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, 7, 9]


def test_a_model_without_its_heads_for_multi_token_prediction(checkpoint, tmp_path):
    heads = change(checkpoint, tmp_path / "heads", with_mtp_head)
    assert_refused("Give --drop-mtp-heads", heads, tmp_path / "out")
    assert_equal(read_hf(convert(heads, tmp_path / "out", "--drop-mtp-heads")), read_hf(checkpoint.parent / "hf"))


def test_a_vocabulary_larger_than_the_embeddings(checkpoint, tmp_path):
    assert_refused("--vocab-size 257", checkpoint, tmp_path / "out", "--vocab-size", 257)


@pytest.mark.parametrize("flags", [("--vocab-size", 0), ("--vocab-size", -5), ("--max-shard-size", 0)], ids=str)
def test_sizes_are_positive(checkpoint, tmp_path, flags):
    assert_refused(flags[0], checkpoint, tmp_path / "out", *flags)


def test_a_source_that_the_checkpoint_would_replace(tmp_path):
    source = write_hf(tmp_path / "release")
    with pytest.raises(UsageError, match="would be replaced"):
        convert(source, tmp_path, "--overwrite")
    assert (source / "model.safetensors").is_file()


def test_the_folder_of_one_iteration_will_do(checkpoint, tmp_path):
    convert(checkpoint / "release", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_folder_that_has_the_tokenizer_already(checkpoint, tmp_path):
    # a run that took its tokenizer from the folder that is now written
    exported = convert(checkpoint, tmp_path / "exported")
    trained = change(
        checkpoint,
        tmp_path / "trained",
        lambda tensors, args: (tensors, argparse.Namespace(**vars(args) | {"tokenizer_model": str(exported)})),
    )
    convert(trained, exported, "--overwrite")
    assert_equal(read_hf(exported), read_hf(checkpoint.parent / "hf"))
    assert (exported / "config.json").is_file() and (exported / "tokenizer.json").is_file()
    # a model that lies where the checkpoint has its tokenizer
    inside = convert(checkpoint, tmp_path / "megatron" / "tokenizer")
    back = convert(convert(inside, tmp_path / "megatron", "--overwrite"), tmp_path / "back")
    assert_equal(read_hf(back), read_hf(checkpoint.parent / "hf"))


def test_what_is_there_is_not_overwritten(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    for source in (checkpoint, checkpoint.parent / "hf"):
        with pytest.raises(UsageError, match="not empty.*--overwrite"):
            convert(source, out)
        assert [file.name for file in out.iterdir()] == ["notes"]
    convert(checkpoint, out, "--overwrite", "--max-shard-size", 1e-4)
    convert(checkpoint, out, "--overwrite")
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"] and (out / "notes").is_file()
    with pytest.raises(UsageError, match="is also the folder to convert"):
        convert(out, out, "--overwrite")


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = harness.python("-m", "hgrn2_megatron", "convert", str(tmp_path), str(tmp_path / "out"))
    errors = [line for line in done.stdout.splitlines() if line.startswith("hgrn2_megatron: error:")]
    assert done.returncode == 2 and len(errors) == 1 and "neither a Hugging Face folder" in errors[0]
