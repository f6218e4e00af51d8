"""BERTScore: how near the tokens of a text and of a reference are to each other, by the embeddings of an encoder
(Zhang et al., 2020, BERTScore: Evaluating Text Generation with BERT).

bert_score tokenises, embeds and matches. It cannot load an encoder without asking on stdin whether to run code of its
own, and with transformers 5 it fails on empty texts and loses the blank before a RoBERTa's first word: that is done
here.
"""

import importlib.metadata
import importlib.util
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from utils.config import EvaluationConfig, UserError
from utils.files import hash_value, hash_weights
from utils.generation.partial_texts import describe_tokenizer
from utils.launch.hub import explain_hub_errors
from utils.modeling.loading import check_folder, load_tokenizer
from utils.scoring.metrics.rouge import PROTOCOLS, sum_by_dialogue
from utils.scoring.metrics.significance import estimate_means

CHUNK_SIZE = 16  # dialogues whose texts are embedded together, of all models
BATCH_SIZE = 32  # texts in a forward pass
MAX_LENGTH = 512  # tokens, of an encoder that names no limit


class Encoder(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_layers: int


def describe_encoder(config: EvaluationConfig) -> dict[str, Any] | None:
    """What the scores follow from, for results.json; UserError if the encoder cannot be used, None without one."""
    if config.bertscore is None:
        return None
    encoder = load_encoder(config)
    weights, tokenizer = hash_weights(encoder.model.state_dict().items()), describe_tokenizer(encoder.tokenizer)
    return {
        "encoder": config.bertscore,
        "num_layers": encoder.num_layers,
        "hash": hash_value([weights, tokenizer]),
        "version": importlib.metadata.version("bert_score"),
    }


def load_encoder(config: EvaluationConfig) -> Encoder:
    """The encoder of --bertscore without the layers above the one whose embeddings are compared."""
    if importlib.util.find_spec("bert_score") is None:
        raise UserError("--bertscore: bert_score is not installed; pip install -r requirements-bertscore.txt")
    name = config.bertscore
    check_folder(name, "bertscore")
    with explain_hub_errors("bertscore", name, "encoder"):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if not isinstance(getattr(settings, "num_hidden_layers", None), int):
        raise UserError(f"--bertscore {name}: {settings.model_type} is not a text encoder")
    settings.num_hidden_layers = num_layers = choose_layer(config, settings)
    tokenizer = load_tokenizer(name, "bertscore", add_prefix_space=True)
    with explain_hub_errors("bertscore", name, "encoder"):
        model, missing = load_quietly(name, settings)
    if missing := sorted(weight for weight in missing if "pooler" not in weight):  # the pooler is not used
        raise UserError(f"--bertscore {name}: its weights lack {', '.join(missing[:3])}")
    if settings.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.model_max_length > 10**6:  # transformers' way to say that it does not know
        positions = getattr(settings, "max_position_embeddings", MAX_LENGTH + 2)
        tokenizer.model_max_length = positions - 2  # RoBERTa leaves two of them unused
    if tokenizer.pad_token_id is None:
        raise UserError(f"--bertscore {name}: its tokenizer has no padding token")
    with explain_hub_errors("bertscore", name, "encoder"), torch.no_grad():
        longest = tokenizer("a " * tokenizer.model_max_length, truncation=True, return_tensors="pt")
        states = model.eval()(**longest, output_hidden_states=True).hidden_states
    if not states[-1].isfinite().all():
        raise UserError(f"--bertscore {name}: its embeddings are not finite")
    if len(states) != num_layers + 1:
        raise UserError(f"--bertscore {name}: a {settings.model_type} cannot be cut to {num_layers} layers here")
    return Encoder(model, tokenizer, num_layers)


def choose_layer(config: EvaluationConfig, settings: PreTrainedConfig) -> int:
    """--bertscore_num_layers, or what bert_score's authors found best for an encoder of this name."""
    from bert_score.utils import model2layers

    name, num_layers, number = config.bertscore, settings.num_hidden_layers, config.bertscore_num_layers
    if number is None and name not in model2layers:
        raise UserError(
            f"--bertscore {name}: bert_score knows no best layer of it; choose one of its {num_layers} with "
            "--bertscore_num_layers"
        )
    if (number or 0) > num_layers:
        raise UserError(f"--bertscore_num_layers {number}: {name} has {num_layers} layers")
    return number or model2layers[name]


def load_quietly(name: str, settings: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """(model, weights that are missing), without a list of the upper layers' weights, which are left out."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = AutoModel.from_pretrained(
            name, config=settings, dtype=torch.float32, output_loading_info=True, weights_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, set(report["missing_keys"])


def score_with_encoder(
    encoder: Encoder, texts: dict[str, list[str]], references: list[list[str]], device: torch.device
) -> dict[str, list[list[float]]]:
    """F1 `scores[model][dialogue][reference]`, to six digits, which do not depend on what else is in a batch; 0 where
    one of the two texts is empty."""
    model = encoder.model.to(device)
    scores = {name: [] for name in texts}
    for start in tqdm(range(0, len(references), CHUNK_SIZE), desc="BERTScore", unit="chunk"):
        chunk = slice(start, start + CHUNK_SIZE)
        wanted = [text for of_model in texts.values() for text in of_model[chunk]]
        wanted += [text for of_dialogue in references[chunk] for text in of_dialogue]
        embedded = embed(encoder._replace(model=model), wanted, device)
        for name, of_model in texts.items():
            scores[name] += [
                [match(embedded.get(text.strip()), embedded.get(reference.strip())) for reference in of_dialogue]
                for text, of_dialogue in zip(of_model[chunk], references[chunk], strict=True)
            ]
    return scores


def embed(encoder: Encoder, texts: list[str], device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(embeddings, weights) of the tokens of each text that is not empty, without blanks around it."""
    from bert_score.utils import get_bert_embedding

    distinct = sorted({text.strip() for text in texts} - {""}, key=lambda text: (len(text), text))
    no_weight = dict.fromkeys([encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id], 0.0)
    weights = defaultdict(lambda: 1.0, no_weight)
    embedded = {}
    for start in range(0, len(distinct), BATCH_SIZE):
        batch = distinct[start : start + BATCH_SIZE]
        states, masks, of_tokens = get_bert_embedding(batch, encoder.model, encoder.tokenizer, weights, device=device)
        lengths = masks.sum(dim=1).tolist()
        for index, (text, length) in enumerate(zip(batch, lengths, strict=True)):
            embedded[text] = states[index, :length].float().cpu(), of_tokens[index, :length].cpu()
    return embedded


def match(text: tuple | None, reference: tuple | None) -> float:
    """F1 of the greedy matching by cosine of two texts' tokens."""
    from bert_score.utils import greedy_cos_idf

    if text is None or reference is None:
        return 0.0
    words = []
    for states, weights in (reference, text):
        words += [states[None], torch.ones(1, len(states)), weights[None]]  # which it normalises in place
    return round(greedy_cos_idf(*words)[2].item(), 6)


def estimate_bertscore(scores: list[list[float]]) -> dict[str, dict[str, float]]:
    """Means of F1 `scores[dialogue][reference]` by each protocol, with their intervals."""
    estimates = {}
    for protocol in PROTOCOLS:
        sums, counts = sum_by_dialogue(scores, protocol)
        (value,), (low,), (high,), _ = estimate_means(sums[:, None], counts)
        estimates[protocol] = {"value": float(value), "low": max(-1, float(low)), "high": min(1, float(high))}
    return estimates
