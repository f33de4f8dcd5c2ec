"""From the text a model writes to reasoning, content and tool calls: one module a format, one way to read for all.

The text is hostile input. Parsers are state machines that read it once, from left to right, in pieces cut anywhere;
they never raise, and what is no valid call is content. A call is announced only when its arguments are whole and valid
JSON: a client that acts on half a call would do something that nobody asked for.
"""
