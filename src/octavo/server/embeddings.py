"""``POST /v1/embeddings``: embeds one or more texts."""

from __future__ import annotations

from base64 import b64encode

from octavo.frontend.inputs import pack
from octavo.server.answers import Embedding, Embeddings, EmbeddingUsage
from octavo.server.endpoint import Endpoint, Job, Origin, Prompts
from octavo.server.protocol import EmbeddingRequest
from octavo.server.service import Service
from octavo.types import RequestOutput


def read(service: Service, body: EmbeddingRequest, origin: Origin) -> Prompts:
    """What is to be embedded."""
    return Prompts(prompts=body.prompts(), add_special_tokens=body.add_special_tokens is not False)


class _Answer:
    def __init__(self, job: Job[EmbeddingRequest]) -> None:
        self._job = job

    def whole(self, results: list[RequestOutput]) -> Embeddings:
        """See `endpoint.Answer`."""
        tokens = sum(len(result.prompt_token_ids) for result in results)
        return Embeddings(
            data=[Embedding(index=i, embedding=self._written(result)) for i, result in enumerate(results)],
            model=self._job.model,
            usage=EmbeddingUsage(tokens, tokens),
        )

    def _written(self, result: RequestOutput) -> list[float] | str:
        numbers = result.embedded().outputs.embedding
        return b64encode(pack(numbers, "f")).decode() if self._job.body.encoding_format == "base64" else numbers


ENDPOINT = Endpoint(EmbeddingRequest, "embd-", read, _Answer)
