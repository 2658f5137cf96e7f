"""The official language model in PyTorch for `bench_lm`: `transformers`' Qwen2 as CosyVoice 2 calls it; torch is an extra.

Ported: llm/llm.py (spec/official.md 3.1-3.5). `text_head=False` is what a careful user of PyTorch would do instead.
"""

import inspect
import itertools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from jaxtyping import Float, Int
from transformers import Qwen2ForCausalLM

from cv2jax.models.text_speech_lm.sequence import IGNORE, SPECIAL, SPEECH, TEXT, stop_ids

_TOP_P, _TOP_K, _WINDOW, _TAU_R = 0.8, 25, 10, 0.1


class OfficialLm:
    """Backbone from a Hugging Face directory, embeddings and head from our parameters; fp32, on the CPU."""

    def __init__(self, directory: pathlib.Path, params: Mapping[str, Float[np.ndarray, "..."]]) -> None:
        self._lm: Any = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in params.items()}
        # Named anew in transformers 5.
        named = inspect.signature(self._lm.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._special = torch.nn.Embedding.from_pretrained(tensors["special_embedding"], freeze=False)
        self._speech = torch.nn.Embedding.from_pretrained(tensors["speech_embedding"], freeze=False)
        num_inputs, num_outputs = tensors["head_kernel"].shape
        self._head = torch.nn.Linear(num_inputs, num_outputs)
        with torch.no_grad():
            self._head.weight.copy_(tensors["head_kernel"].T)
            self._head.bias.copy_(tensors["head_bias"])
        self._modules = (self._lm, self._special, self._speech, self._head)
        self._num_speech_tokens = num_outputs - len(stop_ids(0))

    def train_step(self, batch: Mapping[str, Int[np.ndarray, "B T"]], *, text_head: bool) -> float:
        """The loss, with the gradients of all parameters; with `text_head` as upstream, through Qwen2ForCausalLM.

        Utterances packed into a row become rows, as upstream has them.
        """
        length = int(batch["positions"].max()) + 1
        token, kind, targets = (batch[name].reshape(-1, length) for name in ("token", "kind", "targets"))
        for module in self._modules:
            module.zero_grad(set_to_none=True)
        x = torch.stack([self._embed(*row) for row in zip(token, kind, strict=True)])
        inputs = {"inputs_embeds": x, "attention_mask": torch.ones(token.shape, dtype=torch.bool)}
        if text_head:
            hidden = self._lm(**inputs, output_hidden_states=True).hidden_states[-1]
        else:
            hidden = self._lm.model(**inputs).last_hidden_state
        logits, wanted = self._head(hidden).flatten(0, 1), torch.from_numpy(targets.reshape(-1)).long()
        loss = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE)
        loss.backward()
        return float(loss.detach())

    @torch.inference_mode()
    def decode(
        self, token: Int[np.ndarray, " T"], kind: Int[np.ndarray, " T"], num_tokens: int
    ) -> tuple[float, Float[np.ndarray, " V"]]:
        """(seconds of the tokens behind the prompt, logits [V] behind the prompt); one token a call, as upstream."""
        generator, drawn, position = torch.Generator().manual_seed(0), [], len(token)
        output = self._forward(self._embed(token, kind)[None], None, position)
        first = self._head(output.hidden_states[-1][:, -1])[0]
        logits, start = first, time.perf_counter()
        for _ in range(num_tokens):
            drawn.append(self._draw(logits.log_softmax(dim=-1), drawn, generator))
            position += 1
            x = self._speech.weight[drawn[-1]].reshape(1, 1, -1)
            output = self._forward(x, getattr(output, self._cache_name), position)
            logits = self._head(output.hidden_states[-1][:, -1])[0]
        return time.perf_counter() - start, first.numpy()

    def _forward(self, x: torch.Tensor, cache: Any, num_positions: int) -> Any:
        mask = torch.ones((1, num_positions), dtype=torch.bool)
        options = {self._cache_name: cache, "use_cache": True, "output_hidden_states": True}
        return self._lm(inputs_embeds=x, attention_mask=mask, **options)

    def _embed(self, token: Int[np.ndarray, " T"], kind: Int[np.ndarray, " T"]) -> torch.Tensor:
        """Rows of three tables, run by run, as upstream concatenates them."""
        tables = {SPECIAL: self._special, TEXT: self._lm.get_input_embeddings(), SPEECH: self._speech}
        cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1), len(kind)]
        runs = itertools.pairwise(cuts)
        return torch.cat([tables[int(kind[i])](torch.from_numpy(token[i:j]).long()) for i, j in runs])

    def _draw(self, logp: torch.Tensor, drawn: list[int], generator: torch.Generator) -> int:
        """Repetition-aware sampling (spec/official.md 3.5), no end: nucleus, and drawn anew from all if repeated."""
        logp = logp.clone()
        logp[list(stop_ids(self._num_speech_tokens))] = -torch.inf
        probabilities, order = logp.softmax(dim=0).sort(descending=True, stable=True)
        count, total = 0, 0.0
        while total < _TOP_P and count < _TOP_K:
            total += float(probabilities[count])
            count += 1
        token = int(order[torch.multinomial(probabilities[:count], 1, generator=generator)])
        if drawn[-_WINDOW:].count(token) >= _WINDOW * _TAU_R:
            logp[token] = -torch.inf
            token = int(torch.multinomial(logp.softmax(dim=0), 1, generator=generator))
        return token
