"""What to tell the user when the Hugging Face hub does not give what a script asks for."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import datasets
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from utils.config import UserError

logger = logging.getLogger(__name__)
# What transformers, PEFT, safetensors and datasets raise for files that are missing, broken or of another shape.
LOADING_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, UnpicklingError,
    StrictDataclassError, datasets.exceptions.DatasetsError,
)  # fmt: skip


@contextmanager
def explain_hub_errors(setting: str, name: str, kind: str) -> Iterator[None]:
    """Turn what the libraries raise while they load `name` (a "model", "encoder" or "data set") into a UserError that
    says what is missing, where it was looked for and what to do."""
    if not Path(name).is_dir() and not constants.HF_HUB_OFFLINE:
        # Said beforehand: without a network the libraries retry for half a minute, even with everything cached.
        logger.info("asking %s for %s %s (HF_HUB_OFFLINE=1 uses the cache alone)", constants.ENDPOINT, kind, name)
    try:
        yield
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(f"--{setting} {name}: {_explain(error, name, kind)}") from error


def _explain(error: Exception, name: str, kind: str) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in message:
        return f"this {kind} needs Python code of its own, and these scripts never run a {kind}'s code"
    if isinstance(error, UnpicklingError):
        return "its weights are a pickle that holds more than weights, which is not loaded; take safetensors"
    if Path(name).exists():
        return f"cannot be loaded as {'an' if kind == 'encoder' else 'a'} {kind}: {message}"
    if kind == "data set":
        cache = datasets.config.HF_DATASETS_CACHE
        load = "from datasets import load_dataset; load_dataset(n)"
    else:
        cache = constants.HF_HUB_CACHE
        model = "AutoModel" if kind == "encoder" else "AutoModelForSeq2SeqLM"
        load = f"import transformers as t; t.AutoTokenizer.from_pretrained(n); t.{model}.from_pretrained(n)"
    download = f"load it once where there is a network: python -c \"n='{name}'; {load}\""
    if constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return f"not in the cache {cache}, and HF_HUB_OFFLINE=1 forbids asking the hub; {download}"
    everything = "".join(traceback.format_exception(error, limit=0))  # with its causes, without stack frames
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) or "RepositoryNotFoundError" in everything:
        return f"no such {kind} at {constants.ENDPOINT}, or a private one (hf auth login); a folder must exist"
    if "Connect" in everything or "Timeout" in everything:
        return f"{constants.ENDPOINT} cannot be reached, and it is not whole in the cache {cache}; {download}"
    return message
