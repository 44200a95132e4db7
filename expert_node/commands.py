"""The verb `node`: flags and environment to a NodeConfig, and the line that says it is ready."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal import limits
from shoal.errors import UsageError
from shoal.experts.options import Io, Mode, Verify
from shoal.grpc_settings import prepare_grpc
from shoal.log_options import LogFormat, LogLevel
from shoal.transport import Transport


def node(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            envvar=["SHOAL_MODEL", "MODEL_PATH"], help="an artifact or a slice of one: path or name"
        ),
    ] = "",
    experts: Annotated[
        str | None,
        typer.Option(
            envvar=["SHOAL_EXPERTS", "EXPERTS"], help="experts to own: 0-63+96; default: all it has"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(envvar=["SHOAL_LAYERS", "LAYERS"], help="of these layers: 0-14; default: all"),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(envvar="SHOAL_LISTEN", help="host:port (port 0: any free) or unix:///path"),
    ] = "127.0.0.1:50051",
    port: Annotated[
        int | None,
        typer.Option(envvar=["SHOAL_PORT", "PORT"], help="replaces the port of --listen"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_CACHE",
            metavar="SIZE",
            help="memory for experts, such as 8GiB; the others are read when called; "
            "default: all that it owns",
        ),
    ] = None,
    data_dir: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="SHOAL_DATA_DIR",
            metavar="DIR",
            help="a copy of the artifact's expert files on another drive, read side by side; "
            "may be repeated",
        ),
    ] = None,
    verify: Annotated[
        Verify, typer.Option(envvar="SHOAL_VERIFY", help="which reads of an expert are hashed")
    ] = Verify.FIRST,
    io: Annotated[
        Io, typer.Option(envvar="SHOAL_IO", help="how files are read; auto: the best that works")
    ] = Io.AUTO,
    prefetch: Annotated[
        Mode,
        typer.Option(
            envvar="SHOAL_PREFETCH",
            help="guess what is called next and read it ahead; auto: where that wins",
        ),
    ] = Mode.AUTO,
    warmup: Annotated[
        bool,
        typer.Option(
            "--warmup/--no-warmup",
            envvar=["SHOAL_WARMUP", "WARMUP"],
            help="read all experts that fit before being ready; else each on first use",
        ),
    ] = False,
    warmup_from: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_WARMUP_FROM",
            metavar="FILE",
            help="warm up, the hottest first by this heat map (see --record-heat)",
        ),
    ] = None,
    record_heat: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_RECORD_HEAT",
            metavar="FILE",
            help="write here how often each expert was used, and the routing beside it",
        ),
    ] = None,
    pin_experts: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_PIN_EXPERTS",
            metavar="N|FILE",
            help="never evict the N most used, or those of a list or a heat map",
        ),
    ] = None,
    nvme_thermal_limit: Annotated[
        float,
        typer.Option(
            envvar="SHOAL_NVME_THERMAL_LIMIT",
            metavar="CELSIUS",
            help="above it a drive is read more slowly",
        ),
    ] = 70.0,
    max_read_bandwidth: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_MAX_READ_BANDWIDTH",
            metavar="SIZE",
            help="read at most that much a second, such as 1.5GB",
        ),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            envvar="SHOAL_METRICS_LISTEN",
            metavar="HOST:PORT",
            help="serve /metrics (Prometheus), /health and /ready here",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="SHOAL_CONFIG",
            metavar="FILE",
            help="TOML with these settings, which flags and variables override; SIGHUP reads it "
            "again",
        ),
    ] = None,
    max_queued_calls: Annotated[
        int, typer.Option(envvar="SHOAL_MAX_QUEUED_CALLS", help="that wait; more are turned away")
    ] = limits.MAX_QUEUED_CALLS,
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="SHOAL_THREADS", help="of compute; default: the CPUs this process may use"
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="SHOAL_TLS_CERT",
            metavar="FILE",
            help="serve TLS with this certificate (PEM, its chain behind it); SIGHUP reads it "
            "again",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="SHOAL_TLS_KEY", metavar="FILE", help="and this key")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="SHOAL_TLS_CLIENT_CA",
            metavar="FILE",
            help="only to coordinators whose certificate one of these authorities signed",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="SHOAL_INSECURE",
            help="serve other machines without TLS, or without asking who they are",
        ),
    ] = False,
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="SHOAL_DRAIN_TIMEOUT", help="seconds for calls in flight after SIGTERM"
        ),
    ] = limits.DRAIN_TIMEOUT_S,
    transport: Annotated[
        Transport,
        typer.Option(
            envvar="SHOAL_TRANSPORT",
            help="who speaks gRPC's wire to coordinators: grpcio, or our own fast server (auto)",
        ),
    ] = Transport.AUTO,
    leave_with_stdin: Annotated[
        bool,
        typer.Option(
            "--leave-with-stdin",
            help="drain when standard input closes: with whoever started this node and holds it",
        ),
    ] = False,
    sysfs: Annotated[
        Path,
        typer.Option(
            envvar="SHOAL_SYSFS",
            hidden=True,
            help="where the system tells of drives and their temperatures; tests make their own",
        ),
    ] = Path("/sys"),
    json_ready: Annotated[
        bool,
        typer.Option(
            "--json-ready", envvar="SHOAL_JSON_READY", help="print the ready line as JSON"
        ),
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="SHOAL_LOG_FORMAT", help="of the log on stderr")
    ] = LogFormat.CONSOLE,
    log_level: Annotated[
        LogLevel, typer.Option(envvar="SHOAL_LOG_LEVEL", help="least level that is logged")
    ] = LogLevel.INFO,
) -> None:
    """Serve a range of a model's experts to coordinators.

    Prints one line on stdout once it is ready; logs go to stderr. SIGTERM and SIGINT drain: calls
    in flight are finished, then the process exits with status 0. SIGHUP reads the configuration
    and the artifact again.
    """
    given = {name: value for name, value in locals().items() if name != "context"}
    from expert_node.settings import Settings

    settings = Settings.of_context(context, node, given)
    values = settings.read()
    if not values["model"] and os.environ.get("HF_REPO"):
        raise UsageError("no model: HF_REPO is set, but this version does not fetch from the Hub")
    from expert_node.config import node_config

    configured = node_config(values)
    from shoal.log import configure

    configure(configured.log_format, configured.log_level)
    prepare_grpc("NONE")

    import orjson

    from expert_node import app  # gRPC and the kernels: not for --help

    def announce(ready: app.Ready) -> None:
        text = orjson.dumps(asdict(ready)).decode() if values["json_ready"] else str(ready)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    app.run(configured, announce, reread=lambda: node_config(settings.read()))
