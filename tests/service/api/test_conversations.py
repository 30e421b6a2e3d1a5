"""Answers to bytes from clients, proxies and attackers, and whether the connection stays open."""

import pytest
from raw_http import STEP, Wire, request

HOST = b"Host: localhost\r\n"
RUN = "/v1/models/lstm/sequences"
CHUNKED = "Transfer-Encoding: chunked"
ONE_CHUNK = b"c\r\n" + STEP.tobytes() + b"\r\n"
NEXT = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"


def head(line: str, *headers: str, host: bool = True) -> bytes:
    return "\r\n".join([line, *(["Host: localhost"] if host else []), *headers, "\r\n"]).encode("latin-1")


def post(*headers: str, body: bytes = STEP.tobytes(), length: bool = False) -> bytes:
    """A whole sequence of one step with extra headers, or with headers in place of its length."""
    sent = request(RUN, body, *headers)
    own = f"Content-Length: {len(body)}\r\n\r\n".encode()  # the last header
    return sent if length else sent.replace(own, b"\r\n")


#: The bytes sent and the allowed statuses of the answer. The server then closes the connection.
CLOSED = {
    "length and coding": (post("Content-Length: 12", CHUNKED, body=ONE_CHUNK + b"0\r\n\r\n"), [400]),
    "coding and length": (post(CHUNKED, "Content-Length: 12", body=ONE_CHUNK + b"0\r\n\r\n"), [400]),
    "two equal lengths": (post("Content-Length: 12", length=True), [400]),
    "two lengths": (post("Content-Length: 6", length=True), [400]),
    "a list of lengths": (post("Content-Length: 12, 12"), [400]),
    "length with a sign": (post("Content-Length: +12"), [400]),
    "negative length": (post("Content-Length: -12"), [400]),
    "hexadecimal length": (post("Content-Length: 0xc"), [400]),
    "length with a fraction": (post("Content-Length: 12.0"), [400]),
    "empty length": (post("Content-Length:"), [400]),
    "length with a letter": (post("Content-Length: 12a"), [400]),
    "length with a space inside": (post("Content-Length: 1 2"), [400]),
    "length beyond 64 bits": (post("Content-Length: 18446744073709551628"), [400]),
    "length with other digits": (post("Content-Length: \xb2"), [400]),
    "coding of other letters": (post("Transfer-Encoding: xchunked", body=ONE_CHUNK), [400, 501]),
    "coding with a comma": (post("Transfer-Encoding: chunked,", body=ONE_CHUNK), [400, 501]),
    "coding twice in one": (post("Transfer-Encoding: chunked, chunked", body=ONE_CHUNK), [400, 501]),
    "coding not last": (post("Transfer-Encoding: chunked, identity", body=ONE_CHUNK), [400, 501]),
    "coding in quotes": (post('Transfer-Encoding: "chunked"', body=ONE_CHUNK), [400, 501]),
    "coding behind a vertical tab": (post("Transfer-Encoding: \x0bchunked", body=ONE_CHUNK), [400, 501]),
    "coding with a parameter": (post("Transfer-Encoding: chunked;a=b", body=ONE_CHUNK), [400, 501]),
    "coding with a NUL": (post("Transfer-Encoding: chunked\0", body=ONE_CHUNK), [400]),
    "coding, space before the colon": (post("Transfer-Encoding : chunked", body=ONE_CHUNK), [400]),
    "coding folded": (post("Transfer-Encoding:\r\n chunked", body=ONE_CHUNK), [400]),
    "coding behind a bare LF": (post("X: a\nTransfer-Encoding: chunked", body=ONE_CHUNK), [400]),
    "gzip": (post("Transfer-Encoding: gzip", body=ONE_CHUNK), [400, 501]),
    "chunk of letters": (post(CHUNKED, body=b"zz\r\n"), [400]),
    "chunk with a sign": (post(CHUNKED, body=b"+c\r\n"), [400]),
    "chunk with 0x": (post(CHUNKED, body=b"0xc\r\n"), [400]),
    "chunk with a space before": (post(CHUNKED, body=b" c\r\n"), [400]),
    "chunk beyond 64 bits": (post(CHUNKED, body=b"fffffffffffffffff\r\n"), [400]),
    "negative chunk": (post(CHUNKED, body=b"-1\r\n"), [400]),
    "chunk that is longer": (post(CHUNKED, body=b"b\r\n" + STEP.tobytes() + b"\r\n"), [400]),
    "chunk behind a bare LF": (post(CHUNKED, body=b"c\n" + STEP.tobytes()), [400]),
    "chunk ended by a bare LF": (post(CHUNKED, body=b"c\r\n" + STEP.tobytes() + b"\n0\r\n\r\n"), [400]),
    "trailer without colon": (post(CHUNKED, body=ONE_CHUNK + b"0\r\nabc\r\n\r\n"), [400]),
    "trailer with a length": (post(CHUNKED, body=ONE_CHUNK + b"0\r\nContent-Length: 3\r\n\r\n"), [400]),
    "bare LF": (b"GET /livez HTTP/1.1\nHost: localhost\n\n", [400]),
    "bare CR": (b"GET /livez HTTP/1.1\rHost: localhost\r\r", [400]),
    "NUL in the URL": (head("GET /li\0vez HTTP/1.1"), [400]),
    "NUL in a name": (head("GET /livez HTTP/1.1", "a\0b: c"), [400]),
    "NUL in a value": (head("GET /livez HTTP/1.1", "a: b\0c"), [400]),
    "CR in a value": (head("GET /livez HTTP/1.1", "a: b\rc"), [400]),
    "space before the colon": (head("GET /livez HTTP/1.1", "a : b"), [400]),
    "header without a name": (head("GET /livez HTTP/1.1", ": b"), [400]),
    "header without a colon": (head("GET /livez HTTP/1.1", "abc"), [400]),
    "space before the first header": (b"GET /livez HTTP/1.1\r\n Host: localhost\r\n\r\n", [400]),
    "folded header": (head("GET /livez HTTP/1.1", "a: b", " c"), [400]),
    "folded header with a tab": (head("GET /livez HTTP/1.1", "a: b", "\tc"), [400]),
    "name in parentheses": (head("GET /livez HTTP/1.1", "(a): b"), [400]),
    "no version": (b"GET /livez\r\n\r\n", [400, 505]),
    "no URL": (head("GET HTTP/1.1"), [400]),
    "lower-case version": (head("GET /livez http/1.1"), [400]),
    "other protocol": (head("GET /livez ICE/1.0"), [400]),
    "version 1.2": (head("GET /livez HTTP/1.2"), [400, 505]),
    "version 9.9": (head("GET /livez HTTP/9.9"), [400, 505]),
    "version with more digits": (head("GET /livez HTTP/1.10"), [400]),
    "lower-case method": (head("get /livez HTTP/1.1"), [400, 501]),
    "unknown method": (head("FETCH /livez HTTP/1.1"), [400, 501]),
    "authority": (head("GET localhost:80 HTTP/1.1"), [400]),
    "CONNECT": (head("CONNECT localhost:80 HTTP/1.1"), [501]),
    "a URL of other letters": (head("GET /\xe4 HTTP/1.1"), [400]),
    "no host": (head("GET /livez HTTP/1.1", host=False), [400]),
    "two hosts": (head("GET /livez HTTP/1.1", "Host: localhost"), [400]),
    "host with a user": (head("GET /livez HTTP/1.1", "Host: a@b", host=False), [400]),
    "host that is a list": (head("GET /livez HTTP/1.1", "Host: a, b", host=False), [400]),
    "other expectation": (post("Content-Length: 12", "Expect: 200-ok"), [417]),
    "two keys": (head("GET /v1/models HTTP/1.1", "X-API-Key: a", "X-API-Key: b"), [400]),
    "URL of 9,000 bytes": (head(f"GET /{9000 * 'a'} HTTP/1.1"), [414]),
    "101 headers": (head("GET /livez HTTP/1.1", *(["a: b"] * 101)), [431]),
    "a header of 17,000 bytes": (head("GET /livez HTTP/1.1", f"a: {17_000 * 'b'}"), [431]),
    "a name of 70,000 bytes": (head("GET /livez HTTP/1.1", f"{70_000 * 'a'}: b"), [431]),
    "70,000 bytes of headers": (head("GET /livez HTTP/1.1", *([f"a: {14_000 * 'b'}"] * 5)), [431]),
    "bytes of TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400, 501]),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400, 505]),
    "1.0": (head("GET /livez HTTP/1.0"), [200]),
    "1.0 that would stay": (head("GET /livez HTTP/1.0", "Connection: keep-alive"), [200]),
    "close": (head("GET /livez HTTP/1.1", "Connection: close"), [200]),
    "close among others": (head("GET /livez HTTP/1.1", "Connection: a, Close"), [200]),
}

#: The bytes sent and the statuses of all answers. The connection stays open, and the next request is answered.
OPEN = {
    "line ends before a request": (b"\r\n\r\n" + NEXT, [200]),
    "absolute URL": (head("GET http://localhost/livez HTTP/1.1"), [200]),
    "absolute URL of another host": (head("GET http://other.example/livez HTTP/1.1"), [200]),
    "asterisk": (head("OPTIONS * HTTP/1.1"), [404]),
    "two spaces": (head("GET  /livez HTTP/1.1"), [200]),
    "escaped path": (head("GET /%6civez HTTP/1.1"), [200]),
    "escaped slash": (head("GET /v1%2Fmodels HTTP/1.1"), [404]),
    "escaped NUL": (head("GET /livez%00 HTTP/1.1"), [404]),
    "half an escape": (head("GET /livez%4 HTTP/1.1"), [404]),
    "escape that is none": (head("GET /%zz HTTP/1.1"), [404]),
    "dots": (head("GET /v1/../livez HTTP/1.1"), [404]),
    "two slashes": (head("GET //livez HTTP/1.1"), [404]),
    "query": (head("GET /livez?a=b&&==%00 HTTP/1.1"), [200]),
    "empty header": (head("GET /livez HTTP/1.1", "a:"), [200]),
    "spaces around a value": (head("GET /livez HTTP/1.1", "a: \t b \t"), [200]),
    "value of other letters": (head("GET /livez HTTP/1.1", "a: \xe4"), [200]),
    "100 headers": (head("GET /livez HTTP/1.1", *(["a: b"] * 99)), [200]),
    "60,000 bytes of headers": (head("GET /livez HTTP/1.1", *([f"a: {12_000 * 'b'}"] * 5)), [200]),
    "URL of 8,000 bytes": (head(f"GET /livez?{8000 * 'a'} HTTP/1.1"), [200]),
    "leading zeros": (post("Content-Length: 0012"), [200]),
    "chunks": (post(CHUNKED, body=ONE_CHUNK + b"0\r\n\r\n"), [200]),
    "upper-case coding": (post("Transfer-Encoding: CHUNKED", body=ONE_CHUNK + b"0\r\n\r\n"), [200]),
    "upper-case chunk": (post(CHUNKED, body=b"C\r\n" + STEP.tobytes() + b"\r\n0\r\n\r\n"), [200]),
    "chunk with zeros": (post(CHUNKED, body=b"000c\r\n" + STEP.tobytes() + b"\r\n00\r\n\r\n"), [200]),
    "chunk with an extension": (post(CHUNKED, body=b"c;a=b\r\n" + STEP.tobytes() + b"\r\n0\r\n\r\n"), [200]),
    "trailer": (post(CHUNKED, body=ONE_CHUNK + b"0\r\nUnroll-Position: 7\r\n\r\n"), [200]),
    "body of a GET": (head("GET /livez HTTP/1.1", "Content-Length: 3") + b"abc", [200]),
    "request in a body": (head("GET /livez HTTP/1.1", f"Content-Length: {len(NEXT)}") + NEXT, [200]),
    "no body": (post("Content-Length: 0", body=b""), [422]),
    "four requests": (NEXT + post(length=True) + NEXT + post(length=True), [200] * 4),
    "an error among others": (NEXT + head("GET /nothing HTTP/1.1") + post("A: b", length=True), [200, 404, 200]),
    "other method": (head("DELETE /livez HTTP/1.1"), [405]),
    "upgrade to nothing known": (head("GET /livez HTTP/1.1", "Connection: upgrade", "Upgrade: foo/2"), [200]),
    "upgrade without Connection": (head("GET /livez HTTP/1.1", "Upgrade: websocket"), [200]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_connection_is_closed_behind_the_answer(wire: Wire, name: str) -> None:
    sent, statuses = CLOSED[name]
    wire.send(sent)
    status, headers, content = wire.answer()
    assert status in statuses, content
    assert headers["connection"] == "close"
    if status >= 400:
        assert b'"code":"' in content
    wire.end()
    assert wire.closed()


def test_headers_are_limited_however_they_arrive(wire: Wire) -> None:
    sent, [status] = CLOSED["70,000 bytes of headers"]
    wire.send(NEXT + sent[:60_000])
    assert wire.answer()[0] == 200  # so the beginning of the next request has arrived as well
    wire.send(sent[60_000:])
    assert wire.answer()[0] == status


@pytest.mark.parametrize("name", OPEN)
def test_the_connection_serves_on(wire: Wire, name: str) -> None:
    sent, statuses = OPEN[name]
    wire.send(sent + NEXT)
    answers = [wire.answer() for _ in statuses]
    assert [status for status, _, _ in answers] == statuses, answers
    assert wire.answer()[2] == b'{"live":true}'
