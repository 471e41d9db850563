"""Whatever bytes a peer sends: a typed end, nothing left behind, the node lives on."""

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals.errors import PetalsError
from petals.swarm.config import ChannelLimits, NodeConfig
from petals.swarm.node import SwarmNode
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL, RpcParts, RpcServer, answering
from petals.swarm.rpc.receive_buffer import Budget, Inbox
from petals.testing.manual_clock import ManualClock, settle
from petals.testing.memory_net import MemoryNet
from petals.types import PeerId
from petals.wire import frames
from petals.wire.frames import FrameKind, TensorSpec, encode_message
from petals.wire.handshake import Hello
from petals.wire.passes import Forward
from petals.wire.requests import GetInfo

HELLO = frames.encode_frame(FrameKind.MESSAGE, encode_message(Hello(1, "test")))
SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.sampled_from(["float32", "bool", "nonsense"]),
        st.lists(st.integers(-1, 50), max_size=4).map(tuple),
    ),
    max_size=3,
).map(tuple)
PAYLOADS = st.one_of(
    st.binary(max_size=40),
    SPECS.map(lambda specs: encode_message(Forward("m", (0, 1), (1,)), specs)),
    st.just(encode_message(GetInfo())),
)
FRAMES = st.one_of(
    st.binary(max_size=30),
    st.tuples(st.sampled_from(list(FrameKind)), PAYLOADS).map(lambda f: frames.encode_frame(*f)),
    st.tuples(st.just(FrameKind.CHUNK), st.binary(min_size=1, max_size=200)).map(
        lambda f: frames.encode_frame(*f)
    ),
)


async def send_to_a_node(data: bytes) -> None:
    net, clock = MemoryNet(ManualClock()), ManualClock()

    async def answer(peer, message, tensors):
        return GetInfo(), tensors

    async with (
        SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as node,
        SwarmNode(NodeConfig(), engine=net.engine, clock=clock) as attacker,
    ):
        limits, budget = ChannelLimits(), Budget(2**30, 2**30)
        parts = RpcParts(admission=node.admission, limits=limits, budget=budget, clock=clock)
        rpc = RpcServer(parts, {"test": answering({GetInfo: answer, Forward: answer})})
        await node.transport.serve(STREAM_PROTOCOL, rpc.handle)
        stream = await attacker.transport.open_stream(node.peer_id, STREAM_PROTOCOL, 1.0)
        stream.write(data)
        await settle()
        await stream.close()
        await settle()
        assert rpc.num_streams == budget.used_bytes == 0
        async with await attacker.open_channel(node.peer_id, "test") as channel:
            await channel.request(GetInfo(), expect=GetInfo)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(FRAMES, max_size=6))
def test_a_node_survives_any_stream(greeted, data):
    asyncio.run(send_to_a_node((HELLO if greeted else b"") + b"".join(data)))


@given(
    st.lists(
        st.one_of(
            PAYLOADS.map(lambda payload: ("begin", payload)),
            st.binary(max_size=300).map(lambda payload: ("add_chunk", payload)),
            st.just(("cancel",)),
        ),
        max_size=12,
    )
)
def test_an_inbox_keeps_its_accounts(calls):
    budget = Budget(10_000, 8000)
    inbox = Inbox(PeerId("peer"), ChannelLimits(max_tensor_bytes=900), budget)
    for name, *args in calls:
        try:
            getattr(inbox, name)(*args)
        except PetalsError:
            break
        assert 0 <= budget.used_bytes <= 8000
    while inbox.ready:
        inbox.pop()
    inbox.clear()
    assert budget.used_bytes == 0
