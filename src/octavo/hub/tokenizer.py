"""Text to token ids and back, with the results of Transformers' AutoTokenizer but without importing Transformers.

`HfTokenizer` runs the ``tokenizers`` library on ``tokenizer.json`` and applies what ``tokenizer_config.json`` says on
top: further added tokens, named special tokens, chat templates. As in Transformers 5, the post-processor of
``tokenizer.json`` says what is put around a text; ``add_bos_token`` and ``add_eos_token`` beside it are ignored. Only a
model without ``tokenizer.json``, or one asked for with ``--tokenizer-mode hf`` or ``slow``, needs Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from octavo.errors import ModelError, RequestError
from octavo.hub.configs import read_json
from octavo.hub.remote_code import RepoCode, reference
from octavo.hub.source import Source

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FILES: Final = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model"),
    *("sentencepiece.bpe.model", "tiktoken.model"),
)
MAX_SAID: Final = 300  # characters of an error of Transformers
BATCH: Final = 256  # texts in one of the library's batch calls, which cannot be interrupted
LONG: Final = 4096  # characters or ids from which on the library's batch calls are used: only those release the GIL
_NAME_IT: Final = "Name another one with --tokenizer, or pass --skip-tokenizer-init to work with token ids alone."


class Tokenizer(Protocol):
    """What octavo needs of a tokenizer. Implementations are safe to use from several threads."""

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, added tokens included."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that ``decode(skip_special_tokens=True)`` leaves out."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and the like to their text, as chat templates want them."""

    @property
    def chat_template(self) -> str | None:
        """The default template."""

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All templates by name, ``default`` among them if there is one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, of each text; on several threads where that is possible."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def id_to_token(self, id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    def for_transformers(self) -> Any:
        """The same as a tokenizer of Transformers, for those who know its methods."""


def load_tokenizer(source: Source, *, mode: str = "auto", code: RepoCode | None = None) -> Tokenizer:
    """The tokenizer of ``source`` for ``--tokenizer-mode`` ``auto``, ``hf``, ``slow`` or ``mistral``.

    Auto takes Mistral's own format where there is no ``tokenizer.json``. ``code`` is that of ``source``; None: not
    trusted.

    Raises `ModelError`: HF060 if there is none, HF002 for a broken file, HF010 if only code of the repo could read it,
    HF011 if that code cannot be imported.
    """
    if source.kind == "gguf":
        from octavo.hub.gguf import GgufReader
        from octavo.hub.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(GgufReader(source.path))
    config_file = source.file("tokenizer_config.json")
    config = read_json(config_file) if config_file else {}
    code, named = code or RepoCode(source), reference(config, "AutoTokenizer")
    json_file = source.file("tokenizer.json")
    if mode == "auto" and json_file is not None and not (named and code.trusted):
        return _from_json(source, json_file, config)
    if mode == "mistral" or (mode == "auto" and json_file is None and named is None):
        from octavo.hub import mistral_tokenizer

        own = mistral_tokenizer.find(source.path, bare=mode == "mistral")
        if own is not None:
            return mistral_tokenizer.load(own, {} if mode == "mistral" else _templates(source, config))
        if mode == "mistral":
            raise ModelError(f"{source.path} has no tekken.json and no tokenizer.model.", _NAME_IT, id="HF060")
    if named and (code.trusted or json_file is None):
        return _from_transformers(source, code.load(named), {})
    if named is None and not any(source.file(name) for name in _FILES):
        raise ModelError(f"{source.path} has no tokenizer: none of {', '.join(_FILES)}.", _NAME_IT, id="HF060")
    from transformers import AutoTokenizer

    return _from_transformers(source, AutoTokenizer, {"use_fast": mode != "slow", "trust_remote_code": False})


# --- the tokenizers library -------------------------------------------------------------------------------------------


class HfTokenizer:
    """A `Tokenizer` on ``backend``, of the library ``tokenizers``; what a request asks for is computed once, here."""

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        *,
        clean_up: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.backend = backend
        self._clean_up = clean_up
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        self.chat_template = self.chat_templates.get("default")
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; raises `RequestError` for text that is no Unicode (half a surrogate pair)."""
        try:
            if len(text) > LONG:
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str) or _is_unicode(text):
                raise
            raise RequestError("the text has half a surrogate pair.", "Send valid Unicode.", param="prompt") from error
        ids: list[int] = encoding.ids
        return ids

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        encoded: list[list[int]] = []
        for first in range(0, len(texts), BATCH):
            part = list(texts[first : first + BATCH])
            try:
                found = self.backend.encode_batch_fast(part, add_special_tokens=add_special_tokens)
            except (UnicodeEncodeError, TypeError):  # `encode` tells of the text at fault
                encoded += [self.encode(text, add_special_tokens=add_special_tokens) for text in part]
            else:
                encoded += [encoding.ids for encoding in found]
        return encoded

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str
        if len(ids) > LONG:
            (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        else:
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return _cleaned(text) if self._clean_up else text

    def id_to_token(self, id: int) -> str | None:
        token: str | None = self.backend.id_to_token(id)
        return token

    def token_to_id(self, token: str) -> int | None:
        id: int | None = self.backend.token_to_id(token)
        return id

    def for_transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        further = {name: text for name, text in self.special_tokens.items() if name not in SPECIAL_NAMES}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend,  # which is copied
            chat_template=dict(self.chat_templates) if len(self.chat_templates) > 1 else self.chat_template,
            clean_up_tokenization_spaces=self._clean_up,
            split_special_tokens=self.backend.encode_special_tokens,
            extra_special_tokens=further,
            **{name: text for name, text in self.special_tokens.items() if name in SPECIAL_NAMES},
        )


def _from_json(source: Source, path: Path, config: Mapping[str, Any]) -> HfTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is no tokenizer: {error}.", "Download it again.", id="HF002") from None
    settings = _settings(source, config)
    try:
        _add_tokens(backend, settings)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ModelError(
            f"tokenizer_config.json of {source.name} is broken: {type(error).__name__}: {error}.",
            "Download it again.",
            id="HF002",
        ) from None
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    # Meant for WordPiece; with BPE it would eat spaces that belong to the text, so Transformers ignores it there, too.
    clean_up = bool(settings.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"
    return HfTokenizer(backend, _special_tokens(settings), _templates(source, config), clean_up=clean_up)


def _settings(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``; one without ``added_tokens_decoder`` is of an age when other files held names and
    tokens."""
    if "added_tokens_decoder" in config:
        return dict(config)
    named, added = source.file("special_tokens_map.json"), source.file("added_tokens.json")
    settings = {**config, **(read_json(named) if named else {})}
    return {**settings, added.name: read_json(added)} if added else settings


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens: the standard ones, then a model's own (``image_token`` …)."""
    named = {key: value for key, value in settings.items() if key in SPECIAL_NAMES or key.endswith("_token")}
    if isinstance(settings.get("extra_special_tokens"), Mapping):
        named |= settings["extra_special_tokens"]
    texts = ((key, _text_of(value)) for key, value in named.items() if isinstance(value, (str, Mapping)))
    return {key: text for key, text in texts if text is not None}


def _text_of(token: Any) -> str | None:
    """A token is written as its text or as an object with ``content``."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _add_tokens(backend: Backend, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that the config has beyond ``tokenizer.json``: listed ones by id, then named and further ones."""
    known = backend.get_added_tokens_decoder()
    further = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    more = [*_special_tokens(settings).values(), *(further if isinstance(further, list) else ())]
    special = {_text_of(token) for token in more}
    listed = {int(i): _added(token) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    for text, i in (settings.get("added_tokens.json") or {}).items():
        if int(i) not in known:
            listed[int(i)] = _added({"content": text}, special=text in special)
    wanted = [token for i, token in sorted(listed.items()) if i not in known or repr(known[i]) != repr(token)]
    have = {token.content for token in known.values()} | {token.content for token in wanted}
    for token in more:
        text = _text_of(token)
        if text is not None and text not in have:
            wanted.append(_added(token if isinstance(token, Mapping) else {"content": text}, special=True))
            have.add(text)
    backend.add_tokens(wanted)


def _added(token: Mapping[str, Any], *, special: bool = False) -> AddedToken:
    from tokenizers import AddedToken

    special = special or bool(token.get("special", False))
    return AddedToken(
        token["content"],
        single_word=bool(token.get("single_word", False)),
        lstrip=bool(token.get("lstrip", False)),
        rstrip=bool(token.get("rstrip", False)),
        normalized=bool(token.get("normalized", not special)),
        special=special,
    )


def _templates(source: Source, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files of Jinja before ``tokenizer_config.json`` before a processor's old JSON file."""
    found: dict[str, str] = {}
    folder = source.path / "additional_chat_templates"
    if main := source.file("chat_template.jinja"):
        found["default"] = _read_text(main)
    for path in sorted(folder.glob("*.jinja")):
        found[path.stem] = _read_text(path)
    return found or _named(config.get("chat_template")) or _old_template(source)


def _named(template: Any) -> dict[str, str]:
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, Mapping):
        return {str(name): text for name, text in template.items() if isinstance(text, str)}
    if not isinstance(template, list):
        return {}
    entries = (entry for entry in template if isinstance(entry, Mapping))
    return {str(entry.get("name")): entry["template"] for entry in entries if isinstance(entry.get("template"), str)}


def _old_template(source: Source) -> dict[str, str]:
    path = source.file("chat_template.json")
    return _named(read_json(path).get("chat_template")) if path else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Download it again.", id="HF002") from None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _cleaned(text: str) -> str:
    """Undoes the spaces that WordPiece decoding puts before punctuation and English contractions."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


# --- Transformers, for the odd ones -----------------------------------------------------------------------------------


class AutoTokenizerAdapter:
    """A `Tokenizer` on one of Transformers' own, whose attributes are recomputed at every access and so are kept."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.special_tokens: dict[str, str] = {
            name: text for name, text in inner.special_tokens_map.items() if isinstance(text, str)
        }
        template = getattr(inner, "chat_template", None)
        self.chat_templates: dict[str, str] = dict(template) if isinstance(template, dict) else _named(template)
        self.chat_template = self.chat_templates.get("default")
        vocabulary: dict[str, int] = inner.get_vocab()
        self._tokens = {id: token for token, id in vocabulary.items()}
        self._ids = vocabulary
        self.vocab_size = max(len(inner), max(self._tokens, default=-1) + 1)
        self.special_ids = frozenset(int(id) for id in inner.all_special_ids)
        self.bos_id: int | None = inner.bos_token_id
        self.eos_id: int | None = inner.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, id: int) -> str | None:
        return self._tokens.get(id)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def for_transformers(self) -> Any:
        return self._inner


def _from_transformers(source: Source, factory: Any, options: Mapping[str, Any]) -> AutoTokenizerAdapter:
    """What ``factory``, AutoTokenizer or a class of its kind, makes of the files of ``source``."""
    try:
        inner = factory.from_pretrained(str(source.path), local_files_only=True, **options)
    except Exception as error:  # code of the repo may raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"Transformers cannot load the tokenizer of {source.name}: {said[:MAX_SAID]}", _NAME_IT, id="HF060"
        ) from error
    if not inner.encode("a", add_special_tokens=False):  # some classes look for other files and find none
        raise ModelError(
            f"Transformers' {type(inner).__name__} finds no vocabulary among the files of {source.name}.",
            _NAME_IT,
            id="HF060",
        )
    return AutoTokenizerAdapter(inner)
