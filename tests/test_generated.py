"""The generated stubs import, speak for the package that they are named after, and are fresh."""

import pytest

from shoal.v1 import expert_pb2, expert_pb2_grpc
from tools import generate


def test_the_service_is_named_after_the_package() -> None:
    service = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"]
    assert service.full_name == "shoal.v1.ExpertService"
    assert hasattr(expert_pb2_grpc, "ExpertServiceStub")


def test_a_call_survives_the_wire() -> None:
    frame = expert_pb2.ClientFrame(call=expert_pb2.ExpertCall(call_id=7, deadline_ms=250))
    assert expert_pb2.ClientFrame.FromString(frame.SerializeToString()) == frame


@pytest.mark.processes
def test_generated_files_are_what_their_sources_give() -> None:
    assert generate.stale_files() == []
