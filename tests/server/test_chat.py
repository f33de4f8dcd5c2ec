from __future__ import annotations

from tests.server.fake import CHAT, SPOKEN, Server, events, run


def test_chat_renders_the_template_and_answers_as_the_assistant() -> None:
    async def work() -> None:
        server = Server()
        parts = [{"type": "text", "text": "hi"}]
        body = (await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})).json()
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": SPOKEN, "refusal": None}
        prompt = server.fake.requests[0].token_ids
        assert len(prompt) // 4 == len(server.tokenizer.encode("[user]hi[bot]"))
        assert body["usage"]["prompt_tokens"] == len(prompt) // 4
        assert body["object"] == "chat.completion"

    run(work)


def test_streamed_chat_greets_once_per_choice_and_adds_up() -> None:
    async def work() -> None:
        server = Server()
        response = await server.post("/v1/chat/completions", CHAT | {"stream": True, "n": 2})
        chunks = events(response.text)
        for index in (0, 1):
            deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert "".join(d["content"] for d in deltas) == SPOKEN
        assert chunks[0]["object"] == "chat.completion.chunk"

    run(work)


def test_chat_logprobs_carry_tokens_bytes_and_the_best_rivals() -> None:
    async def work() -> None:
        server = Server()
        options = {"logprobs": True, "top_logprobs": 3, "max_completion_tokens": 2}
        body = (await server.post("/v1/chat/completions", CHAT | options)).json()
        content = body["choices"][0]["logprobs"]["content"]
        assert len(content) == 2
        assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
        assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5, -1.5, -2.5]
        plain = (await server.post("/v1/chat/completions", CHAT | {"logprobs": True, "max_tokens": 2})).json()
        assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    run(work)
