"""What each setting means, for the help of `unroll serve`, for messages and for `unroll config show`.

The values, their types and their limits are those of `settings.py`; this file imports nothing, so that help is quick.
"""

from dataclasses import dataclass

#: Of the variables in the environment.
PREFIX = "UNROLL_"


@dataclass(frozen=True, slots=True)
class Description:
    """One setting.

    Attributes:
        metavar: What its value is; empty if it is a switch, and `no` if it is one that --no-… turns off.
        about: What it decides.
        default: Its default, as help shows it; empty if `about` says it or there is none.
        several: Its flag may be given several times.
    """

    metavar: str
    about: str
    default: str = ""
    several: bool = False


#: By group and by name, in the order of the help.
GROUPS = {
    "network": {
        "host": Description("ADDRESS", "address to listen on", "127.0.0.1"),
        "port": Description("PORT", "port to listen on", "8000"),
        "workers": Description("N", "number of processes that share the port; more than one needs --store", "1"),
        "worker_port": Description("PORT", "first per-worker port: worker N also listens on this port + N - 1"),
        "auth": Description(
            "keys|none",
            "who may connect: keys (of --keys), or none: anybody who can reach the address, which is allowed only by "
            "this word unless the address is of this machine alone",
        ),
        "keys": Description("FILE", "file of API keys, which `unroll keys new` writes; read again at SIGHUP"),
        "jwt_keys": Description(
            "FILE",
            "JWK set of an identity provider, a file or a URL, whose JWTs are taken as keys are; a file is read again "
            "at SIGHUP, a URL "
            "(https, or http of this machine) every five minutes; needs the package extra jwt",
        ),
        "jwt_issuer": Description("ISSUER", "what JWTs say in iss; needed with --jwt-keys"),
        "jwt_audience": Description("AUDIENCE", "what JWTs for this server say in aud; needed with --jwt-keys"),
        "jwt_tenant_claim": Description("CLAIM", "claim that has the tenant", "tenant"),
        "jwt_scope_claim": Description(
            "CLAIM", "claim that has the scopes, as words in a string or as a list", "scope"
        ),
        "tls_cert": Description(
            "FILE", "certificate chain in PEM: listen with TLS 1.2 or 1.3; read again at SIGHUP, for new connections"
        ),
        "tls_key": Description("FILE", "key of the certificate in PEM (default: it is in the file of --tls-cert)"),
        "tls_password_file": Description("FILE", "file with the password of the key, if it is encrypted"),
        "tls_client_ca": Description("FILE", "CAs in PEM: each client needs a certificate of one of them"),
        "allowed_hosts": Description(
            "NAMES",
            'names that clients use for this server, such as ["models.example.com"]; addresses are always allowed '
            "(default: any with keys or --auth none, and localhost without)",
            several=True,
        ),
        "page": Description("no", "answer / with a page of the models; by default only on a loopback address"),
        "allowed_origins": Description(
            "ORIGINS",
            "origins of the other pages that may use this server from a browser, "
            'such as ["https://app.example"], or ["*"] for all; to pages of its own origin it always answers',
            several=True,
        ),
        "drain_delay": Description(
            "SECONDS", "seconds between SIGTERM and the end of listening, for load balancers to notice", "0"
        ),
        "drain_timeout": Description(
            "SECONDS", "seconds for connected clients to receive their answers at shutdown", "10"
        ),
    },
    "models": {
        "repository": Description("DIR", "bundle repository: a folder of <name>/<version>/"),
        "serve": Description(
            "NAME=VERSION",
            "version that new sessions of a model begin on, such as co2=1; "
            "otherwise what the file <name>/serve says, else the highest",
            several=True,
        ),
        "strict": Description("", "do not start if any bundle cannot be served; else serve the others"),
        "bundle_memory": Description(
            "BYTES", "memory that a bundle may take when it is tried before it is served, in bytes", "4294967296"
        ),
        "bundle_time": Description(
            "SECONDS", "processor time that a bundle may take when it is tried before it is served", "30"
        ),
        "trusted_keys": Description(
            "PATH",
            "public key, or folder of them (*.pem), as `unroll keys pair` makes them; "
            "a bundle that none of them has signed is refused",
        ),
        "allow_operators": Description(
            "OPERATORS",
            'operators that graphs may have besides those that export writes, such as ["RandomNormal"]',
            several=True,
        ),
    },
    "device": {
        "device": Description(
            "DEVICE", "cpu, cuda:N, a list such as cuda:0,cuda:1, or auto: a GPU if there is one", "auto"
        ),
        "threads": Description("N", "onnxruntime threads per model call on a CPU", "1"),
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
        "tombstone_life": Description("SECONDS", "seconds for which the server remembers why a session ended", "3600"),
        "spill_bytes": Description(
            "BYTES", "host memory for idle sessions that do not fit in session_capacity, in bytes", "268435456"
        ),
        "reply_bytes": Description(
            "BYTES", "memory per model for replies that are kept for retries, in bytes", "268435456"
        ),
        "state_file": Description(
            "FILE", "file for memory sessions, also beside a store: written at shutdown, read at startup"
        ),
        "snapshot_keys": Description(
            "KEYS",
            'secrets that sign client-held snapshots: @FILE with one a line, or ["new","old"]; '
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
        "store_timeout": Description(
            "SECONDS", "seconds without an answer after which the store counts as down", "0.5"
        ),
        "durability": Description(
            "memory|stored", "default durability of new sessions (stored if --store is set, otherwise memory)"
        ),
    },
    "limits": {
        "max_batch": Description("N", "maximum rows per model call", "256"),
        "max_batch_steps": Description("N", "maximum rows x time steps per model call", "2048"),
        "piece_steps": Description("N", "time steps of a long request per model call", "64"),
        "max_queue": Description("N", "maximum waiting requests per model", "8192"),
        "overload_wait": Description(
            "SECONDS", "seconds a new request may wait while more work arrives than runs (0: no limit)", "0.02"
        ),
        "request_timeout": Description("SECONDS", "seconds within which the work on a request must start", "30"),
        "max_connections": Description(
            "N|auto",
            "connections of a process at a time; beyond, idle ones are closed, then only probes and metrics answered; "
            "auto: as many as the limit of open files allows",
            "auto",
        ),
        "max_connections_per_address": Description(
            "N", "connections of a process from one client address; a proxy is one address (default: any number)"
        ),
        "head_timeout": Description("SECONDS", "seconds for a TLS handshake, and for the head of a request", "20"),
        "keep_alive": Description("SECONDS", "seconds after which a connection without requests is closed", "75"),
        "min_rate": Description(
            "BYTES",
            "bytes a second at which a body must arrive, and an answer be read, once head_timeout has passed",
            "1024",
        ),
        "max_header_bytes": Description("BYTES", "maximum headers of a request, in bytes", "65536"),
        "max_body_bytes": Description("BYTES", "maximum request body, in bytes", "16777216"),
        "max_json_bytes": Description("BYTES", "maximum JSON in a request, in bytes", "2097152"),
        "max_held_bytes": Description(
            "BYTES", "maximum bytes of requests and answers at a time, beside the sessions' states", "536870912"
        ),
        "max_steps": Description("N", "maximum time steps per request", "65536"),
        "max_rollout_steps": Description("N", "maximum time steps per rollout whose inputs are fed back", "4096"),
        "max_sequences": Description("N", "maximum whole sequences per request", "1024"),
    },
    "operation": {
        "admin": Description(
            "",
            "list sessions at /v1/admin/sessions; with keys or --admin-port also load and unload models, drain the "
            "server and set its log level",
        ),
        "admin_port": Description(
            "PORT", "port of its own for /metrics, and with --admin for /v1/admin and the loading of models"
        ),
        "admin_host": Description("ADDRESS", "address that the --admin-port listens on", "127.0.0.1"),
        "log_requests": Description(
            "none|errors|all",
            "requests that leave a line in the log, at most 100 a second: none, errors, all",
            "errors",
        ),
        "log_level": Description("debug|info|warning|error", "minimum severity of log lines", "info"),
    },
}
SETTINGS = {name: description for group in GROUPS.values() for name, description in group.items()}
