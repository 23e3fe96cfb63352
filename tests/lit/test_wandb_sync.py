"""`wandb sync` uploads a resumed run as one history, to a stand-in for its server."""

import gzip
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mergekit_lit.lit.loggers import log_failure, make_loggers
from mergekit_lit.lit.run_facts import RunFacts


class Server(ThreadingHTTPServer):
    """Keeps what is uploaded of one run's history, and answers as little as W&B needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: list[tuple[int, list[int]]] = []
        self.summary: dict = {}

    def answer(self, path: str, body: dict) -> dict:
        if "file_stream" in path:
            files = body.get("files", {})
            if history := files.get("wandb-history.jsonl"):
                steps = [json.loads(line)["_step"] for line in history["content"]]
                self.history.append((history["offset"], steps))
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.summary.update(json.loads(line))
            return {}
        lines = sum(len(steps) for _, steps in self.history)
        tail = [
            json.dumps({"_step": step}) for _, steps in self.history[-1:] for step in steps[-1:]
        ]
        run = {
            "id": "run",
            "name": body.get("variables", {}).get("name"),
            "displayName": "mnist",
            "config": "{}",
            "summaryMetrics": "{}",
            "wandbConfig": "{}",
            "tags": [],
            "historyLineCount": lines,
            "historyTail": json.dumps(tail),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
        }
        model = {"id": "p", "name": "p", "bucket": run if lines else None}
        files = {"runID": "run", "uploadHeaders": [], "files": []}
        upsert = {"bucket": run, "inserted": not lines}
        return {"data": {"upsertBucket": upsert, "model": model, "createRunFiles": files}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        packed = self.headers.get("Content-Encoding") == "gzip"
        answer = self.server.answer(self.path, json.loads(gzip.decompress(raw) if packed else raw))
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.slow
def test_files_of_a_resumed_run_become_one_history(tmp_path):
    for steps in ([0, 1, 2, 3], [2, 3, 4, 5]):
        loggers = make_loggers("wandb", tmp_path, RunFacts(name="mnist"), resume=steps[0] > 0)
        for step in steps:
            for logger in loggers:
                logger.log_metrics({"loss": float(step)}, step=step)
        log_failure(loggers, KeyboardInterrupt())
        time.sleep(1)  # Files of W&B are named by the second.
    runs = sorted(map(str, tmp_path.glob("wandb/offline-run-*")))
    assert len(runs) == 2
    server = Server()
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "x" * 40,
        "WANDB_MODE": "online",
        "WANDB_ERROR_REPORTING": "false",
    }
    environment.pop("WANDB_SERVICE", None)
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *runs]
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)
    server.shutdown()
    server.server_close()
    # Each upload goes on at the line where the one before ended.
    offsets, steps = zip(*server.history, strict=True)
    assert list(offsets) == [sum(map(len, steps[:i])) for i in range(len(steps))]
    assert [step for part in steps for step in part] == [0, 1, 2, 3, 4, 5]
    assert server.summary["loss"] == 5
    assert all(list(tmp_path.glob(f"wandb/{Path(run).name}/*.synced")) for run in runs)
