"""The process that `AsyncLLM` and the server run an engine in: the engine's, with grammars.

Contract: where text and engine meet. `ProcessEngineClient` runs `main`, given `ENGINE_PROCESS`; an engine
in a thread takes `grammar_masks`. Importing this loads neither torch nor a tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourfold.core.client import Launch

if TYPE_CHECKING:
    from fourfold.text.grammar_mask import GrammarMasks

ENGINE_PROCESS = __name__


def grammar_masks(launch: Launch) -> GrammarMasks:
    """What makes masks for the model that is launched. Raises `FourfoldError`s."""
    from fourfold.core.config import ModelConfig
    from fourfold.text.grammar_mask import GrammarMasks
    from fourfold.text.tokenizer import Tokenizer
    from fourfold.weights.locate import locate

    directory = locate(launch.config.model).directory
    model = ModelConfig.from_directory(directory).config
    tokenizer = Tokenizer.from_directory(launch.tokenizer or directory)
    return GrammarMasks(tokenizer, model.vocab_size, model.eos_token_id)


def main(descriptor: int) -> int:
    """See `fourfold.engine.worker.main`."""
    from fourfold.engine import worker

    return worker.main(descriptor, grammar_masks)
