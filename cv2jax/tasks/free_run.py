"""What a language model in training says for held-out texts, whole and as if they arrived, and what is heard in it."""

from typing import Any

import jax
from jax.sharding import Mesh

from cv2jax.config import TrainConfig
from cv2jax.data.token_batches import TokenBatches
from cv2jax.evaluation.error_rate import error_rate
from cv2jax.evaluation.free_running import free_running_metrics
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.parallel.sharding import axis_rules
from cv2jax.synthesis.sampling import SamplingOptions, make_request_sampler
from cv2jax.synthesis.speech_stream import SpeechRequest, generate
from cv2jax.tasks.stages import make_speech_stage
from cv2jax.tasks.trained import TokenReader
from cv2jax.text.characters import normalize_transcript
from cv2jax.text.tags import END_OF_PROMPT, split_prefix, split_prefix_tokens
from cv2jax.text.tokenizer import load_text_tokenizer

NUM_EXAMPLES = 8  # texts shown with what was heard


class FreeRun:
    """A fixed set of held-out texts, decoded by the default sampler with the same draws at every step.

    UserError for a speech tokenizer that did not make the corpus's tokens; without one nothing is heard.
    """

    def __init__(self, config: TrainConfig, model_config: TextSpeechLmConfig, data: TokenBatches) -> None:
        self._model_config, self._seed = model_config, config.seed
        self._records = data.examples(config.evaluate_utterances)
        end_of_prompt = load_text_tokenizer(data.corpus.text_tokenizer).special_ids[END_OF_PROMPT]
        self._requests = []
        for record in self._records:
            prefix, text = split_prefix_tokens(record.text_tokens, end_of_prompt)
            self._requests.append(
                SpeechRequest(text_tokens=text, prompt_text_tokens=prefix, name=f"utterance {record.id!r}")
            )
        run = config.data.speech_tokenizer
        self._reader = TokenReader(run, data.corpus.metadata.speech_tokenizer) if run else None

    def metrics(self, params: Any, mesh: Mesh) -> dict[str, Any]:
        """`free_running_metrics` and `cer` of whole texts, and the same as `streamed_…`; params lie on the mesh."""
        return self._speak(params, mesh, stream=False) | self._speak(params, mesh, stream=True)

    def _speak(self, params: Any, mesh: Mesh, *, stream: bool) -> dict[str, Any]:
        options = SamplingOptions()
        sampler = make_request_sampler(options)
        row = sampler.options(options)
        with jax.set_mesh(mesh), axis_rules():
            stage = make_speech_stage(self._model_config, params, sampler)
            results = generate(stage, self._requests, options=row, seed=self._seed, stream=stream)
        spoken = [result.speech_tokens for result in results]
        references = [record.speech_tokens for record in self._records]
        metrics = free_running_metrics(spoken, [result.status for result in results], references)
        if self._reader is not None:
            texts = [normalize_transcript(split_prefix(record.text)[1]) for record in self._records]
            heard = self._reader.read(spoken)
            metrics["cer"] = error_rate(texts, heard).character_error_rate
            metrics["examples"] = [list(pair) for pair in zip(texts, heard, strict=True)][:NUM_EXAMPLES]
        return {f"streamed_{name}" if stream else name: value for name, value in metrics.items()}
