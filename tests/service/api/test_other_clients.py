"""Requests from clients that offer HTTP/2 on a plain connection, as some do by default, arrive complete."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_http import STEP
from serving import Oracle, Running
from waiting import PATIENCE

CURL, JAVA = shutil.which("curl"), shutil.which("java")

JAVA_CLIENT = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.WebSocket;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.concurrent.CompletionStage;
import java.util.concurrent.SynchronousQueue;

public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        String root = arguments[0] + "/v1/models/lstm/sessions";
        byte[] step = ByteBuffer.allocate(12).order(ByteOrder.LITTLE_ENDIAN)
            .putFloat(0.1f).putFloat(-0.2f).putFloat(0.3f).array();
        post(client, root, "application/json", "{\\"session_id\\": \\"java-1\\"}".getBytes());
        post(client, root + "/java-1/steps", "application/octet-stream", step);
        post(client, root + "/java-1/steps", "application/json", "{\\"inputs\\": [[0.1, -0.2, 0.3]]}".getBytes());
        SynchronousQueue<String> answers = new SynchronousQueue<>();
        WebSocket stream = client.newWebSocketBuilder().buildAsync(
            URI.create(arguments[0].replace("http", "ws") + "/v1/models/lstm/stream"), new WebSocket.Listener() {
                public CompletionStage<?> onText(WebSocket socket, CharSequence data, boolean last) {
                    return answer(socket, "text");
                }
                ByteBuffer message = ByteBuffer.allocate(100).order(ByteOrder.LITTLE_ENDIAN);
                public CompletionStage<?> onBinary(WebSocket socket, ByteBuffer data, boolean last) {
                    message.put(data);
                    if (last) {
                        message.clear();
                        return answer(socket, "position " + message.getLong(16));
                    }
                    socket.request(1);
                    return null;
                }
                public void onError(WebSocket socket, Throwable error) {
                    answer(socket, error.toString());
                }
                CompletionStage<?> answer(WebSocket socket, String answer) {
                    try { answers.put(answer); } catch (InterruptedException stopped) { }
                    socket.request(1);
                    return null;
                }
            }).join();
        stream.sendText("{\\"op\\": \\"open\\", \\"sessions\\": [{\\"handle\\": 0}]}", true).join();
        String last = answers.take();
        byte[] head = {1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
        for (int i = 0; i < 1000; i++) {
            stream.sendBinary(ByteBuffer.allocate(36).put(head).put(step).flip(), true).join();
            last = answers.take();
        }
        System.out.println(last);
        stream.abort();
        System.exit(0);
    }

    static void post(HttpClient client, String url, String type, byte[] body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url)).header("Content-Type", type)
            .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
        HttpResponse<byte[]> answer = client.send(request, HttpResponse.BodyHandlers.ofByteArray());
        System.out.println(answer.statusCode() + " " + answer.headers().firstValue("unroll-position").orElse("-"));
    }
}
"""


@pytest.mark.skipif(JAVA is None or shutil.which("javac") is None, reason="a JDK is missing")
def test_java(server: Running, tmp_path: Path) -> None:
    """Java's client offers h2c with each request and sends a WebSocket frame's header separately from its payload."""
    (tmp_path / "Client.java").write_text(JAVA_CLIENT)
    ran = subprocess.run(
        [str(JAVA), "-XX:TieredStopAtLevel=1", "Client.java", server.url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.stdout.splitlines() == ["201 -", "200 1", "200 2", "position 1000"], ran.stderr


@pytest.mark.skipif(CURL is None, reason="curl is missing")
def test_curl(server: Running, oracle: Callable[..., Oracle]) -> None:
    def post(path: str, body: bytes, media_type: str) -> bytes:
        command = [str(CURL), "--silent", "--show-error", "--http2", "--fail-with-body", "--data-binary", "@-"]
        ran = subprocess.run(
            [*command, "-H", f"Content-Type: {media_type}", server.url + path],
            input=body,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.returncode == 0, ran
        return ran.stdout

    opened = json.loads(post("/v1/models/lstm/sessions", b'{"session_id": "curl-1"}', "application/json"))
    assert opened["session_id"] == "curl-1"
    output = post("/v1/models/lstm/sessions/curl-1/steps", STEP.tobytes(), "application/octet-stream")
    assert output == oracle("lstm")(STEP).tobytes()
