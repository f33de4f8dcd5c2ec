"""A small Hugging Face Hub on loopback that the real ``huggingface_hub`` client talks to, and nothing else

    with Hub() as hub:
        commit = hub.push("owner/name", {"config.json": b"{}"})
        subprocess.run(..., env={**os.environ, **hub.env(cache)})
        assert hub.requests == []

The client reads its environment when it is imported, so it has to run in a process of its own. Served are the model
info, the listing of files, and the files with ETag, commit and ranges. Paths and headers are those that the client of
2.4 uses and the Hub documents in docs/hub/api.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """``gated``: everybody sees the listing, only ``token`` gets files. ``private``: only ``token`` sees anything.

    ``refused`` is an answer to everything: (status, code, message). ``lost`` files are listed and not there.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    token: str | None = None
    refused: tuple[int, str, str] | None = None
    lost: set[str] = field(default_factory=set)

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class Hub:
    """The server. ``requests`` lists what it was asked for, ``ranges`` which bytes of which path its answers to GET
    were of, ``sent`` counts the bytes that went out (also to a client that was killed meanwhile).

    ``fail_with`` makes it answer everything with that status, ``failures`` so many times at most. With ``cdn`` weights
    are served by another host, as the real one does it; ``leaked`` counts tokens that were sent there. The next
    ``cuts`` answers with weights break off in the middle. ``renamed`` repos answer with a redirect to their new name.
    ``plain``: a model's info names files without hashes, as that of some mirrors. ``rate``: weights go out at so many
    bytes a second. ``retry_after`` goes with answers of status 429.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[str] = []
        self.ranges: list[tuple[str, range]] = []
        self.sent = 0
        self.counting = threading.Lock()
        self.fail_with: int | None = None
        self.failures = 1 << 30
        self.cdn = False
        self.leaked = 0
        self.cuts = 0
        self.plain = False
        self.rate: float | None = None
        self.retry_after = "0"
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(
        self,
        repo_id: str,
        files: Files | Path,
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Makes a commit of ``files`` (a folder: all of its files) on ``branch``; returns its hash."""
        if isinstance(files, Path):
            root = files
            files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated, repo.private, repo.token = gated, private, token
        text = json.dumps([repo_id, len(repo.commits), sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        return commit

    def env(self, cache: Path) -> dict[str, str]:
        """What the client's process needs to talk to this Hub and to nothing else, with its cache in ``cache``.

        ``HF_HUB_CACHE`` has to be unset: it goes before ``HF_HOME``.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
        }


def git_oid(data: bytes) -> str:
    """The hash under which git stores a file: what the Hub gives as the ETag of a small one."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.fail_with is not None and self.hub.failures > 0:
                self.hub.failures -= 1
                raise _Refused(self.hub.fail_with, message="told to fail")
            self._route(path)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            if refused.status == 429:
                headers["Retry-After"] = self.hub.retry_after
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _route(self, path: str) -> None:
        moved = next((old for old in self.hub.renamed if f"/{old}/" in f"{path}/"), None)
        if moved is not None:
            self._send(307, b"", {"Location": self.path.replace(moved, self.hub.renamed[moved], 1)})
        elif path == "/api/models":
            (wanted,) = parse_qs(urlsplit(self.path).query)["search"]
            found = [name for name in self.hub.repos if wanted.lower() in name.lower()]
            self._json([{"id": name, "modelId": name} for name in found])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            repo = self._find(match[1], "main")[0]
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            self._json({"branches": branches, "tags": [], "converts": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, commit, files = self._find(match[1], match[2] or "main")
            blobs = parse_qs(urlsplit(self.path).query).get("blobs") in (["true"], ["True"])
            siblings = [
                self._sibling(name, data) if blobs else {"rfilename": name} for name, data in sorted(files.items())
            ]
            info = {"id": match[1], "modelId": match[1], "sha": commit, "private": repo.private, "siblings": siblings}
            self._json({**info, "gated": "auto" if repo.gated else False, "tags": [], "downloads": 0})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self._find(match[1], match[2])[2]
            self._json([self._entry(name, data) for name, data in sorted(files.items())])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self.hub.leaked += "Authorization" in self.headers
            self._bytes(self.hub.repos[match[1]].commits[match[2]][match[3]], {})
        else:
            raise _Refused(404, message=f"no route for {path}")

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        """A file in a model's info with ``?blobs=true``; large ones have their hash in LFS, too."""
        hash = {} if self.hub.plain else {"blobId": git_oid(data)}
        return {"rfilename": name, "size": len(data), **hash, **self._lfs("sha256", name, data)}

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        """The same file in a listing."""
        return {"type": "file", "path": name, "size": len(data), "oid": git_oid(data), **self._lfs("oid", name, data)}

    def _lfs(self, key: str, name: str, data: bytes) -> dict[str, Any]:
        if not self._is_large(name):
            return {}
        return {"lfs": {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}

    def _is_large(self, name: str) -> bool:
        return self.hub.cdn and name.endswith((".safetensors", ".gguf"))

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str, Files]:
        repo = self.hub.repos.get(repo_id)
        allowed = repo is not None and (not repo.private or self._has_token(repo))
        if repo is not None and repo.refused is not None:
            raise _Refused(*repo.refused)
        if repo is None or not allowed:  # the Hub does not tell a missing repo from a hidden one
            raise _Refused(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        commit = repo.commit(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit, repo.commits[commit]

    def _has_token(self, repo: Repo) -> bool:
        return repo.token is not None and self.headers.get("Authorization") == f"Bearer {repo.token}"

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repo, commit, files = self._find(repo_id, revision)
        if repo.gated and not self._has_token(repo):
            raise _Refused(403 if self.headers.get("Authorization") else 401, "GatedRepo", "Access is restricted")
        if name not in files or name in repo.lost:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[name]
        if self._is_large(name):
            port = urlsplit(self.hub.url).port
            linked = {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            target = f"http://localhost:{port}/cdn/{repo_id}/{commit}/{name}"
            self._send(302, b"", {"Location": target, "X-Repo-Commit": commit, **linked})
        else:
            self._bytes(data, {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": commit})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        """``data``, or the range of it that was asked for."""
        status, headers, span = 200, {**headers, "Accept-Ranges": "bytes"}, range(len(data))
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status, span = data[first : last + 1], 206, range(first, last + 1)
        if self.command == "GET":
            self.hub.ranges.append((self.path, span))
        self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and len(body) > 1 and self.path.endswith(".safetensors"):
            self.hub.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self._write(body)

    def _write(self, body: bytes) -> None:
        rate = self.hub.rate if self.path.endswith(".safetensors") else None
        step = max(int(rate / 20), 1) if rate else len(body)
        with contextlib.suppress(ConnectionError):  # the client may be killed
            for start in range(0, len(body), step or 1):
                if rate:
                    time.sleep(step / rate)
                piece = body[start : start + step]
                with self.hub.counting:  # before it goes out: who has the whole answer finds all of it counted
                    self.hub.sent += len(piece)
                self.wfile.write(piece)
