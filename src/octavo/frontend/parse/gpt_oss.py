"""GPT-OSS (harmony): messages with a header that names a channel and perhaps a recipient.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{…}<|call|>      and in the end      <|channel|>final<|message|>…<|return|>

The channel ``analysis`` is reasoning, what goes to ``functions.…`` is a call, the rest is content. The text of the
assistant's first header is in the prompt, and the token that ends the answer has no text here.
"""

from __future__ import annotations

import re

from octavo.frontend.parse.events import Content, Reasoning
from octavo.frontend.parse.openings import NAME, Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import Call, is_name

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
OPENINGS = (Opening(rf"to=functions\.{NAME}(?![\w.:/-])[^\n]{{0,80}}?{re.escape(MESSAGE)}", "arguments"),)
FINAL = rf"{re.escape(CHANNEL)}final[^\n]{{0,80}}?{re.escape(MESSAGE)}"  # begins the answer
MAX_HEADER = 512

_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def parse(text: Reader) -> Steps[None]:
    """Reads messages; text outside of them is content."""
    kind: type[Content | Reasoning] = Content
    while True:
        marker = yield from text.until(START, CHANNEL, *ENDS, kind=kind)
        if marker is None:
            return
        if marker in ENDS:
            text.drop()
            kind = Content
            continue
        header = yield from text.collect(MESSAGE, MAX_HEADER)
        if header is None:
            continue
        header = marker + header
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        to = recipient[1] if recipient else ""
        if to.startswith("functions."):
            kind = Content
            yield from _call(text, to.removeprefix("functions."))
            continue
        text.drop()
        kind = Reasoning if to or (channel is not None and channel[1] == "analysis") else Content


def _call(text: Reader, name: str) -> Steps[None]:
    arguments = yield from text.json()
    if isinstance(arguments, dict) and is_name(name):
        text.call([Call(name, arguments)])
