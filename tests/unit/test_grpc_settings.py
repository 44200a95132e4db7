"""What gRPC is told before it is imported."""

import os
import subprocess
import sys

import pytest

from shoal import grpc_settings
from shoal.grpc_settings import prepare_grpc

CALL = """
from shoal.grpc_settings import prepare_grpc
prepare_grpc("NONE")
import os, grpc
channel = grpc.insecure_channel("127.0.0.1:1")  # the first makes it read its switches
channel.close()
print(os.environ["GRPC_EXPERIMENTS"])
"""


def test_the_grpc_that_is_installed_knows_the_switches_and_says_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == grpc_settings.WHO_WAITS_READS
    assert ran.stderr == ""


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "mine")
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    prepare_grpc("NONE")
    assert os.environ["GRPC_EXPERIMENTS"] == "mine"
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"


def test_another_version_is_told_of_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_settings, "_KNOWN_TO", "grpcio-0.*.dist-info")
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    prepare_grpc("NONE")
    assert "GRPC_EXPERIMENTS" not in os.environ
