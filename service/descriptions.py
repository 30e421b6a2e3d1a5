"""Descriptions of all settings, for the help of `unroll serve`, for messages and for `unroll config show`.

Types and limits are in `settings.py`. This file imports nothing heavy, so that help is quick.
"""

from dataclasses import dataclass

#: Prefix of the environment variables.
PREFIX = "UNROLL_"


@dataclass(frozen=True, slots=True)
class Description:
    """One setting.

    Attributes:
        metavar: Form of the value; empty for a switch, `no` for a switch that --no-… turns off.
        default: The default as shown in help; empty if `about` states it or there is none.
        several: The flag may be repeated.
    """

    metavar: str
    about: str
    default: str = ""
    several: bool = False


#: Settings by group and name, in the order of the help.
GROUPS = {
    "network": {
        "host": Description("ADDRESS", "address to listen on", "127.0.0.1"),
        "port": Description("PORT", "port to listen on", "8000"),
        "workers": Description("N", "number of processes that share the port; more than one needs --store", "1"),
        "worker_port": Description("PORT", "first per-worker port: worker N also listens on this port + N - 1"),
        "auth": Description(
            "keys|none",
            "who may connect: clients with a key of --keys, or everyone (none); without --keys, the default is "
            "everyone, but only on a loopback address",
        ),
        "keys": Description("FILE", "file of API keys, which `unroll keys new` writes; read again at SIGHUP"),
        "jwt_keys": Description(
            "FILE",
            "JWK set of an identity provider, whose JWTs are accepted like keys: a file, read again at SIGHUP, or a "
            "URL (https, or http on this machine), read every five minutes; needs the package extra jwt",
        ),
        "jwt_issuer": Description("ISSUER", "required value of the claim iss; needed with --jwt-keys"),
        "jwt_audience": Description("AUDIENCE", "required value of the claim aud; needed with --jwt-keys"),
        "jwt_tenant_claim": Description("CLAIM", "claim with the tenant", "tenant"),
        "jwt_scope_claim": Description("CLAIM", "claim with the scopes, a list or a string of words", "scope"),
        "tls_cert": Description(
            "FILE", "certificate chain in PEM: listen with TLS 1.2 or 1.3; read again at SIGHUP, for new connections"
        ),
        "tls_key": Description("FILE", "private key in PEM (default: read from the file of --tls-cert)"),
        "tls_password_file": Description("FILE", "file with the password of the key, if it is encrypted"),
        "tls_client_ca": Description("FILE", "CAs in PEM: require a client certificate from one of them"),
        "allowed_hosts": Description(
            "NAMES",
            'host names that this server answers to, such as ["models.example.com"]; addresses are always allowed '
            "(default: any with keys or --auth none, otherwise localhost)",
            several=True,
        ),
        "page": Description("no", "serve a web page of the models at / (default: only on a loopback address)"),
        "allowed_origins": Description(
            "ORIGINS",
            "other origins whose web pages may use this server, "
            'such as ["https://app.example"], or ["*"] for all; its own origin is always allowed',
            several=True,
        ),
        "drain_delay": Description(
            "SECONDS", "seconds to keep listening after SIGTERM, for load balancers to notice", "0"
        ),
        "drain_timeout": Description(
            "SECONDS", "seconds for connected clients to receive their answers at shutdown", "10"
        ),
    },
    "models": {
        "repository": Description("DIR", "bundle repository: a folder of <name>/<version>/"),
        "serve": Description(
            "NAME=VERSION",
            "version for new sessions of a model, such as co2=1 "
            "(default: the one in the file <name>/serve, else the highest)",
            several=True,
        ),
        "strict": Description("", "do not start if any bundle cannot be served (default: serve the others)"),
        "bundle_memory": Description(
            "BYTES", "maximum memory of the trial of a bundle before it is served, in bytes", "4294967296"
        ),
        "bundle_time": Description(
            "SECONDS", "maximum processor time of the trial of a bundle before it is served", "30"
        ),
        "trusted_keys": Description(
            "PATH",
            "public key of `unroll keys pair`, or a folder of them (*.pem); "
            "bundles without a signature by one of them are refused",
        ),
        "allow_operators": Description(
            "OPERATORS",
            'further operators to allow in graphs, such as ["RandomNormal"]',
            several=True,
        ),
    },
    "device": {
        "device": Description(
            "DEVICE", "cpu, cuda:N, a list such as cuda:0,cuda:1, or auto: a GPU if there is one", "auto"
        ),
        "threads": Description(
            "N", "onnxruntime threads per model call on a CPU; on busy cores several are slower than one", "1"
        ),
        "precision": Description("float32|tf32|float16", "precision of matrix products on a GPU", "float32"),
        "cells": Description("fused|onnxruntime", "kernels for LSTM and GRU layers in single steps on a GPU", "fused"),
        "buckets": Description("N,N", "batch sizes of single steps on a GPU, such as [1,64,256]", several=True),
    },
    "sessions": {
        "session_capacity": Description(
            "N|auto",
            "maximum open sessions per model version and device; auto: as many as fit in memory_share",
            "65536",
        ),
        "memory_share": Description(
            "SHARE", "fraction of the free memory that auto may use for a model's sessions", "0.5"
        ),
        "idle_timeout": Description("SECONDS", "seconds until an idle session expires; 0: never", "900"),
        "tombstone_life": Description("SECONDS", "seconds to remember why a session ended", "3600"),
        "spill_bytes": Description(
            "BYTES", "host memory for idle sessions that do not fit in session_capacity, in bytes", "268435456"
        ),
        "reply_bytes": Description("BYTES", "memory per model for replies kept for retries, in bytes", "268435456"),
        "state_file": Description(
            "FILE", "file for memory sessions, with or without a store: written at shutdown, read at startup"
        ),
        "snapshot_keys": Description(
            "KEYS",
            'secrets that sign client-held snapshots: @FILE with one per line, or ["new","old"]; '
            "the first signs, all verify",
            several=True,
        ),
    },
    "store": {
        "store": Description(
            "URL",
            "store of durable sessions: file:///folder (for the processes of one machine), redis://host:port/db, "
            "redis+sentinel://host:port,host:port/service, redis+cluster://host:port, ..., or @FILE",
        ),
        "store_prefix": Description(
            "PREFIX", "prefix of all keys in Redis; deployments that share a Redis need different ones", "unroll"
        ),
        "store_sync": Description(
            "always|everysec|never",
            "when file:/// is synced to the disk: after every commit, every second, or at the end",
            "everysec",
        ),
        "store_timeout": Description("SECONDS", "seconds to wait for the store before it counts as down", "0.5"),
        "durability": Description(
            "memory|stored", "default durability of new sessions (stored if --store is set, otherwise memory)"
        ),
    },
    "limits": {
        "max_batch": Description("N", "maximum rows per model call", "256"),
        "max_batch_steps": Description("N", "maximum rows x time steps per model call", "2048"),
        "piece_steps": Description("N", "time steps of a long request per model call", "64"),
        "max_queue": Description("N", "maximum waiting requests per model", "8192"),
        "overload_wait": Description("SECONDS", "seconds a new request may wait in an overload; 0: no limit", "0.02"),
        "request_timeout": Description("SECONDS", "seconds until work on a request must start", "30"),
        "max_connections": Description(
            "N|auto",
            "maximum connections per process; above, idle ones are closed, then only probes and metrics are answered; "
            "auto: as many as the limit of open files allows",
            "auto",
        ),
        "max_connections_per_address": Description(
            "N", "maximum connections per process and client address; a proxy is one address (default: no limit)"
        ),
        "head_timeout": Description("SECONDS", "seconds for a TLS handshake, and for the head of a request", "20"),
        "keep_alive": Description("SECONDS", "seconds until a connection without requests is closed", "75"),
        "min_rate": Description(
            "BYTES",
            "minimum bytes per second of a body sent and of an answer read, after the first head_timeout seconds",
            "1024",
        ),
        "max_header_bytes": Description("BYTES", "maximum size of a request's headers, in bytes", "65536"),
        "max_body_bytes": Description("BYTES", "maximum size of a request's body, in bytes", "16777216"),
        "max_json_bytes": Description("BYTES", "maximum size of JSON in a request, in bytes", "2097152"),
        "max_held_bytes": Description(
            "BYTES", "maximum memory for requests and answers, not counting the sessions' states, in bytes", "536870912"
        ),
        "max_steps": Description("N", "maximum time steps per request", "65536"),
        "max_rollout_steps": Description("N", "maximum time steps per rollout", "4096"),
        "max_sequences": Description("N", "maximum whole sequences per request", "1024"),
    },
    "operation": {
        "admin": Description(
            "",
            "list sessions at /v1/admin/sessions; with keys or --admin-port also load and unload models, drain the "
            "server and set its log level",
        ),
        "admin_port": Description(
            "PORT", "separate port for /metrics and, with --admin, for /v1/admin and the loading of models"
        ),
        "admin_host": Description("ADDRESS", "address that the --admin-port listens on", "127.0.0.1"),
        "log_requests": Description(
            "none|errors|all",
            "requests to log, at most 100 lines per second",
            "errors",
        ),
        "log_level": Description("debug|info|warning|error", "minimum severity of log lines", "info"),
    },
}
SETTINGS = {name: description for group in GROUPS.values() for name, description in group.items()}
