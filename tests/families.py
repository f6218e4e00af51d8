"""A tiny random model of each family of AutoModelForSeq2SeqLM that reads text, with the tests' own tokenizer."""

from pathlib import Path

import torch
from conftest import REPOSITORY, make_rows
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    EncoderDecoderConfig,
    PretrainedConfig,
)

from utils.config import EvaluationConfig
from utils.generation.decoding import decode_batch
from utils.modeling.loading import load_model, load_tokenizer
from utils.prompting import build_prompt

NUM_TOKENS = 331  # of the demo's tokenizer, whose padding is 0 and whose end is 1
SIDES = {f"{side}_{name}": size for side in ("encoder", "decoder")
         for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
BART = SIDES | {"d_model": 32, "max_position_embeddings": 256, "decoder_start_token_id": 1}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 256}  # fmt: skip
GEMMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
         "vocab_size": NUM_TOKENS, "bos_token_id": 2}  # fmt: skip
SEAMLESS = BART | {"hidden_size": 32, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 4,
            "speech_encoder_intermediate_size": 8, "t2u_vocab_size": 16, "t2u_encoder_layers": 1,
            "t2u_decoder_layers": 1}  # fmt: skip
# What the configuration of each family's tiny model is built with.
SHAPES = {
    "bart": BART,
    "bigbird_pegasus": BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "encoder-decoder": {},
    "fsmt": BART | {"src_vocab_size": NUM_TOKENS, "tgt_vocab_size": NUM_TOKENS, "langs": ["en", "de"]},
    "led": BART | {"attention_window": 8, "max_encoder_position_embeddings": 256,
                   "max_decoder_position_embeddings": 256},
    "longt5": T5 | {"local_radius": 7},
    "m2m_100": BART,
    "marian": BART,
    "mbart": BART,
    "mt5": T5,
    "mvp": BART,
    "nllb-moe": BART | {"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "pegasus": BART,
    "pegasus_x": BART | {"block_size": 8, "num_global_tokens": 4},
    "plbart": BART,
    "prophetnet": {"hidden_size": 32, "num_encoder_layers": 2, "num_encoder_attention_heads": 4,
                   "encoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
                   "decoder_ffn_dim": 64, "max_position_embeddings": 256, "decoder_start_token_id": 1},
    "seamless_m4t": SEAMLESS,
    "seamless_m4t_v2": SEAMLESS,
    "switch_transformers": T5 | {"num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1,
                                 "num_sparse_decoder_layers": 1},
    "t5": T5,
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA, "decoder_start_token_id": 2},
    "t5gemma2": {"decoder_start_token_id": 2},
    "umt5": T5,
}  # fmt: skip


def build_config(family: str) -> PretrainedConfig:
    tokens = {"vocab_size": NUM_TOKENS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if family == "encoder-decoder":
        sides = (BertConfig(**BERT, vocab_size=NUM_TOKENS), BertConfig(**BERT, vocab_size=NUM_TOKENS))
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides, pad_token_id=0, eos_token_id=1)
        config.decoder_start_token_id = 2
        return config
    if family == "t5gemma2":
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                  "image_size": 14, "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
        encoder = {"text_config": GEMMA, "vision_config": vision, "image_token_index": NUM_TOKENS - 1,
                   "boi_token_index": NUM_TOKENS - 2, "eoi_token_index": NUM_TOKENS - 3}  # fmt: skip
        return AutoConfig.for_model(family, encoder=encoder, decoder=GEMMA, **SHAPES[family], eos_token_id=1)
    return AutoConfig.for_model(family, **(tokens | SHAPES[family]))


def write_family(folder: Path, family: str, steep: bool = False, **settings) -> Path:
    """A folder with a model whose weights are random. If they are steep, texts differ from source to source; else
    gradients are exact."""
    torch.manual_seed(0)
    config = build_config(family)
    config.update(settings)
    model = AutoModelForSeq2SeqLM.from_config(config)
    std = 0.8 if steep and "gemma" not in family else 0.15
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=std)
    if steep:  # texts end each at its own length, at tokens that they come to
        tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model")
        prompts = [tokenizer(build_prompt(row["dialogue"]), return_tensors="pt").input_ids for row in make_rows(8, 3)]
        model.generation_config.eos_token_id = None
        texts = [model.eval().generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() for ids in prompts]
        first = {ids[1] for ids in texts[::2]}
        ends = {ids[4] for ids in texts[::3]} | {ids[9] for ids in texts[1::3]}
        model.generation_config.eos_token_id = sorted({1, *(ends - first or ends)})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model").save_pretrained(folder)
    return folder


def find_targets(model: torch.nn.Module) -> list[str]:
    """What the family calls the projections to queries and values."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    pairs = (["q", "v"], ["q_proj", "v_proj"], ["query", "value"], ["query_proj", "value_proj"])
    return next(pair for pair in pairs if names.issuperset(pair))


def decode_here_and_there(
    folder: Path, stock: Path | None = None, num_dialogues: int = 8, **settings
) -> tuple[list[list[int]], list[list[int]]]:
    """Dialogues' tokens: of our decoding in one batch, and of stock generate() one by one.

    Args:
        stock: a folder for the latter, if it is another.
    """
    config = EvaluationConfig(max_new_tokens=20, **settings)
    rows, tokenizer = make_rows(num_dialogues, seed=3), load_tokenizer(str(folder))
    prompts = sorted(tokenizer([build_prompt(row["dialogue"]) for row in rows]).input_ids, key=len, reverse=True)
    here = [ids for ids, _ in decode_batch(load_model(str(folder), "sdpa", torch.float32).eval(), prompts, config)]
    model = AutoModelForSeq2SeqLM.from_pretrained(stock or folder).eval()
    settings = {"num_beams": 1, "do_sample": False, "max_new_tokens": 20, "length_penalty": 1.0} | settings
    there = [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **settings)
        for ids in prompts
    ]
    return here, [ids[0, 1:].tolist() for ids in there]
