"""A stand-in for the server of Weights & Biases: as much of it as a run needs that logs numbers."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from typing import Any

PROJECT = {"id": "p", "name": "searchrl", "entity": {"id": "e", "name": "me"}}


class StandIn:
    """Serves on loopback until it is closed, and keeps what was logged: histories by run id."""

    def __init__(self) -> None:
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                self._send(stand_in.answer(self.path, body))

            def do_PUT(self) -> None:  # files of the run
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._send({})

            def _send(self, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """To one request."""
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history is not None:
                lines = self.histories[path.split("/")[-2]]
                lines[history["offset"] :] = map(json.loads, history["content"])
            return {"exitcode": None, "limits": {}}
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        variables = asked.get("variables", {})
        for name, answer in (
            ("mutation UpsertBucket", self._upsert),
            ("query RunResumeStatus", self._resume_status),
            ("mutation CreateRunFiles", self._files),
        ):
            if name in asked["query"]:
                return {"data": answer(variables)}
        return {"data": {}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        lines = self.histories.setdefault(name, [])
        given = json.loads(variables.get("config") or "{}")
        self.configs.setdefault(name, {}).update({key: entry["value"] for key, entry in given.items()})
        bucket: dict[str, Any] = {"id": "b", "name": name, "displayName": name, "project": PROJECT}
        bucket |= {"config": "{}", "historyLineCount": len(lines)}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        lines = self.histories.get(variables["name"])
        if lines is None:
            return {"model": {**PROJECT, "bucket": None}}
        bucket = {
            "id": "b",
            "name": variables["name"],
            "displayName": variables["name"],
            "historyLineCount": len(lines),
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
        }
        return {"model": {**PROJECT, "bucket": bucket}}

    def _files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
