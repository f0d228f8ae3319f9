"""Who is told of a night: a real command and a real web server, and what is told when they fail."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jobs.config.reader import load_config
from jobs.host.notify import NotifyConfig, notify

EVENT = {
    "event": "promoted",
    "model": "solar-shop",
    "date": "2026-11-21",
    "version": 7,
    "reason": None,
    "report": "/w/report.json",
}


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; /slow answers late, /gone never accepts, /moved leads elsewhere."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        received: list[Any] = self.server.received  # type: ignore[attr-defined]
        received.append((self.path, self.headers["Content-Type"], json.loads(body)))
        if self.path.startswith("/slow"):
            time.sleep(1)
        self.send_response({"/gone": 410, "/moved": 302}.get(self.path.split("?")[0], 204))
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.received = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def told(config: NotifyConfig, event: dict[str, Any] = EVENT) -> list[str]:
    lines: list[str] = []
    notify(config, event, lines.append)
    return lines


def test_webhook_gets_the_event_as_json(hook):
    assert told(NotifyConfig(url=f"http://127.0.0.1:{hook.server_port}/T0/secret?token=x")) == []
    assert hook.received == [("/T0/secret?token=x", "application/json", EVENT)]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("gone", " answers with status 410"),
        ("moved", " answers with status 302"),
        ("slow", " does not answer within 0.2 s (notify.url_seconds)"),
    ],
)
def test_webhook_that_fails_is_told_without_its_token(hook, path, why):
    url = f"http://user:pw@127.0.0.1:{hook.server_port}/{path}?token=secret"
    [line] = told(NotifyConfig(url=url, url_seconds=0.2))
    assert line == f"notification of 'promoted' failed: notify.url http://127.0.0.1:{hook.server_port}{why}"
    assert [received[0] for received in hook.received] == [f"/{path}?token=secret"]


def test_webhook_that_is_not_there_is_told_without_its_token(hook):
    hook.server_close()
    [line] = told(NotifyConfig(url=f"http://127.0.0.1:{hook.server_port}/secret"))
    assert line.endswith(f"notify.url http://127.0.0.1:{hook.server_port} does not answer")


def test_command_gets_the_event_on_its_input_and_facts_in_its_environment(tmp_path):
    out = tmp_path / "out"
    assert (
        told(NotifyConfig(command=f'cat > {out}; printf "|$SOLAR_EVENT $SOLAR_VERSION [$SOLAR_REASON]" >> {out}')) == []
    )
    event, _, facts = out.read_text().partition("|")
    assert json.loads(event) == EVENT
    assert facts == "promoted 7 []"


def test_a_reason_is_no_part_of_the_command(tmp_path):
    reason = f"`touch {tmp_path}/bad`; $(touch {tmp_path}/bad)"
    assert (
        told(NotifyConfig(command=f'printf "%s" "$SOLAR_REASON" > {tmp_path}/out'), {**EVENT, "reason": reason}) == []
    )
    assert (tmp_path / "out").read_text() == reason
    assert not (tmp_path / "bad").exists()


def test_command_that_fails_is_told_with_its_last_line():
    [line] = told(NotifyConfig(command="echo first >&2; echo no route to https://u:pw@mail >&2; exit 3"))
    assert (
        line
        == "notification of 'promoted' failed: notify.command ended with exit code 3: no route to https://u:***@mail"
    )


def test_command_that_does_not_read_or_leaves_something_running_is_no_failure():
    started = time.monotonic()
    assert told(NotifyConfig(command="exec <&-; sleep 30 & true")) == []
    assert told(NotifyConfig(command="true"), {**EVENT, "reason": "x" * 1_000_000}) == []
    assert time.monotonic() - started < 20


def test_command_that_hangs_is_killed_with_what_it_started(tmp_path):
    alive = f"while sleep 0.1; do echo x >> {tmp_path}/alive; done"
    [line] = told(NotifyConfig(command=f"({alive}) & {alive}", command_seconds=0.5))
    assert line.endswith("notify.command did not end within 0.5 s (notify.command_seconds)")
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "alive").stat().st_size == size


def test_both_are_tried_and_nothing_is_raised(hook):
    url = f"http://127.0.0.1:{hook.server_port}/a"
    assert len(told(NotifyConfig(command="exit 1", url=url))) == 1
    assert len(hook.received) == 1
    assert told(NotifyConfig()) == []
    loop: dict[str, Any] = {"event": "failed"}
    loop["reason"] = loop
    assert [line.rpartition(": ")[2] for line in told(NotifyConfig(command="true", url=url), loop)] == [
        "ValueError"
    ] * 2


@pytest.mark.parametrize("url", ["ftp://host/x", "hooks.example/secret", "https://", "http://host:port/x"])
def test_address_that_is_none_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match=r"^url is not a web address: it must have the form https://HOST/PATH$"):
        NotifyConfig(url=url)


def test_webhook_may_stand_in_the_environment(hook, monkeypatch):
    monkeypatch.setenv("SOLAR_NOTIFY_URL", f"http://127.0.0.1:{hook.server_port}/from-environment")
    assert told(NotifyConfig()) == []
    assert told(NotifyConfig(url=f"http://127.0.0.1:{hook.server_port}/from-recipe")) == []
    monkeypatch.setenv("SOLAR_NOTIFY_URL", "secret")
    assert told(NotifyConfig()) == ["SOLAR_NOTIFY_URL is not a web address: it must have the form https://HOST/PATH"]
    assert [path for path, *_ in hook.received] == ["/from-environment", "/from-recipe"]


def test_webhook_of_a_recipe_stays_out_of_what_is_printed_and_stored():
    url = "https://hooks.example/T0/secret"
    config = load_config("nightly", "synthetic", ["--notify.url", url, "--notify.command", f"{sys.executable} x.py"])
    assert config.notify.url == url
    assert config.as_dict()["notify"]["url"] == "https://hooks.example"
