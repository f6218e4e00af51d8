"""The head that is Flan-T5's own, the numbers of parameters, and what an export must be to be called saved."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_rows
from helpers import build_t5_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, T5Config

from utils.config import LoraTrainingConfig, UserError
from utils.files import raise_disk_errors
from utils.modeling.export import compare_with_folder, export_model, save_tokenizer
from utils.modeling.families import check_head
from utils.modeling.loading import load_model, load_tokenizer
from utils.modeling.lora import add_lora


def test_an_adapter_is_trained_in_fp32_on_a_base_that_stays_in_bf16(flan_t5):
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.bfloat16), LoraTrainingConfig())
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_lora_settings_reach_the_adapter(flan_t5):
    config = LoraTrainingConfig(lora_r=3, lora_alpha=6, lora_dropout=0.25, lora_target_modules=["q", "wo"])
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), config)
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q", "wo"}
    query = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    assert query.lora_A["default"].weight.shape[0] == 3
    assert query.scaling["default"] == 2 and query.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("name", ["target_modules", "rank_pattern"])
def test_a_regular_expression_without_end_is_stopped(flan_t5, tmp_path, monkeypatch, name):
    monkeypatch.setattr("utils.modeling.adapters.SECONDS_FOR_PATTERNS", 1)
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), LoraTrainingConfig())
    model.save_pretrained(tmp_path)
    path, pattern = tmp_path / "adapter_config.json", "(([a-z0-9._A-Z])+)+!"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: pattern if name == "target_modules" else {pattern: 8}}))
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path), "sdpa", torch.float32)
    text = f"{tmp_path}: adapter_config.json: the regular expression {pattern!r}: does not end within 1 s"
    assert text in str(error.value)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_pickle_runs_no_code(flan_t5, tmp_path, kind):
    class Touch:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    folder = shutil.copytree(flan_t5, tmp_path / "model")
    if kind == "adapter":
        add_lora(load_model(str(flan_t5), "sdpa", torch.float32), LoraTrainingConfig()).save_pretrained(folder)
        (folder / "adapter_model.safetensors").unlink()
    else:
        (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Touch()}, folder / f"{'pytorch' if kind == 'model' else 'adapter'}_model.bin")
    with pytest.raises(UserError, match="its weights are a pickle that holds more than weights, which is not loaded"):
        load_model(str(folder), "sdpa", torch.float32)
    assert not (tmp_path / "ran").exists()


def test_export_keeps_the_head_apart(flan_t5, tmp_path):
    """transformers 5 says that T5 ties it; a folder that says so too loads wrong elsewhere."""
    accelerator, tokenizer = Accelerator(), load_tokenizer(str(flan_t5))
    model = load_model(str(flan_t5), "sdpa", torch.float32)
    export_model(accelerator, model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = load_file(flan_t5 / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not torch.equal(reloaded.lm_head.weight, reloaded.shared.weight)


def test_a_head_that_was_tied_is_seen(flan_t5):
    for lora in (False, True):
        model = load_model(str(flan_t5), "sdpa", torch.float32)
        model = add_lora(model, LoraTrainingConfig()) if lora else model
        check_head(model)
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        with pytest.raises(RuntimeError, match="lm_head has been tied"):
            check_head(model)


def test_a_tied_head_stays_tied(tmp_path):
    shape = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    BartForConditionalGeneration(BartConfig(**shape, **heads)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "sdpa", torch.float32)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["lm_head.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"])
def test_export_is_compared_with_what_was_trained(flan_t5, name):
    state_dict = load_model(str(flan_t5), "sdpa", torch.float32).state_dict()
    compare_with_folder(state_dict, flan_t5)
    changed = state_dict | {name: state_dict[name] + 1e-6 * torch.randn_like(state_dict[name])}
    with pytest.raises(RuntimeError, match=name):
        compare_with_folder(changed, flan_t5)


def test_the_tokenizer_is_saved_for_transformers_4_too(flan_t5, tmp_path):
    """That it does load there is checked by transformers_4.py."""
    for name, tokenizer in (("t5", build_t5_tokenizer()), ("demo", load_tokenizer(str(flan_t5)))):
        save_tokenizer(tokenizer, tmp_path / name)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert "extra_special_tokens" not in config
        assert len(config.get("additional_special_tokens", [])) == (100 if name == "t5" else 0)
        assert config["tokenizer_class"] == ("T5Tokenizer" if name == "t5" else "PreTrainedTokenizerFast")
        reloaded, text = load_tokenizer(str(tmp_path / name)), "#Person1#: I lend <extra_id_7> the tent.</s>"
        assert type(reloaded) is type(tokenizer)
        assert reloaded(text).input_ids == tokenizer(text).input_ids
        assert reloaded.all_special_tokens == tokenizer.all_special_tokens


def test_nan_is_what_it_was(flan_t5, tmp_path):
    """An embedding row of a token that never occurs may hold it."""
    model = load_model(str(flan_t5), "sdpa", torch.float32)
    model.shared.weight.data[7] = math.nan
    model.save_pretrained(tmp_path)
    state_dict = model.state_dict()
    compare_with_folder(state_dict, tmp_path)
    state_dict["shared.weight"][7, 3] = -math.nan
    with pytest.raises(RuntimeError, match="does not load as it was trained: shared.weight differs"):
        compare_with_folder(state_dict, tmp_path)


def test_a_link_in_the_exports_place_is_not_followed(flan_t5, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.unchecked").symlink_to(tmp_path / "theirs")
    model, tokenizer = load_model(str(flan_t5), "sdpa", torch.float32), load_tokenizer(str(flan_t5))
    export_model(Accelerator(cpu=True), model, tokenizer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]
    assert (tmp_path / "theirs" / "config.json").read_text() == "theirs"
    assert "export.unchecked" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_an_adapters_file_is_the_same_in_every_process(flan_t5, tmp_path):
    """PEFT keeps the names as a set, whose order changes from process to process: 7 are in order once in 5,040."""
    names = ["wo", "q", "wi_1", "k", "o", "wi_0", "v"]
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), LoraTrainingConfig(lora_target_modules=names))
    export_model(Accelerator(cpu=True), model, load_tokenizer(str(flan_t5)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_no_room_for_a_tokenizer(flan_t5, small_disk):
    """Its library says so with an error that has no class of its own."""
    folder = small_disk(8)
    with pytest.raises(OSError, match="No space left on device"), raise_disk_errors(folder):
        load_tokenizer(str(flan_t5)).save_pretrained(folder)
    with pytest.raises(KeyError), raise_disk_errors(folder):  # other errors stay what they are
        raise KeyError("os error")


def test_a_tokenizer_that_is_only_a_sentencepiece_model(tmp_path):
    """As mt5-small's and t5-v1_1's."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written, texts = io.BytesIO(), [row["dialogue"] for row in make_rows(40)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=50, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    T5Config().save_pretrained(tmp_path)
    ids = load_tokenizer(str(tmp_path))(texts[0]).input_ids
    assert ids == [*SentencePieceProcessor(model_file=str(tmp_path / "spiece.model")).encode(texts[0]), 1]
