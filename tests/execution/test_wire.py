"""Frames: what goes in comes out, and nothing else ever does."""

import contextlib
import json
import struct
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from rayserve_sarathi.errors import WireError
from rayserve_sarathi.execution.activations import InMessage, pack, unpack
from rayserve_sarathi.execution.codec import MAX_BODY_BYTES, MAX_BUFFERS
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import (
    MAX_HEADER_BYTES,
    Activation,
    Frame,
    FrameReader,
    Message,
    RelayedStep,
    encode,
)
from rayserve_sarathi.step import StepInput, StepOutput, TokenHistory
from tests.execution.messages import are_equal, stage_messages, step_inputs, step_outputs
from tests.stages import Chunk, make_step

STEP = make_step(Chunk(token_ids=[1], block_ids=[0], context_len=3), Chunk(token_ids=[4, 5], block_ids=[1]))
OUTPUT = StepOutput(step_id=1, epoch=0, token_ids=np.array([7], np.int32))


def bytes_of(frame: Frame) -> bytes:
    return b"".join(frame)


def read(data: bytes, *, piece_bytes: int = 1 << 20) -> list[Message]:
    """Return the messages in `data`, which arrives in pieces."""
    reader, messages = FrameReader(), []
    while data:
        num_bytes = min(len(reader.missing), piece_bytes, len(data))
        reader.missing[:num_bytes] = data[:num_bytes]
        data = data[num_bytes:]
        if (message := reader.advance(num_bytes)) is not None:
            messages.append(message)
    return messages


def frame_of(header: object, body: bytes = b"", *, magic: bytes = b"SRTH") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sIQ", magic, len(text), len(body)) + text + body


@settings(max_examples=40)
@given(step_inputs | step_outputs)
def test_a_message_comes_back_as_it_was(message: Message):
    (received,) = read(bytes_of(encode(message)))

    assert are_equal(received, message)


@settings(max_examples=40)
@given(stage_messages)
def test_a_message_between_stages_comes_back_as_it_was(message: StageMessage):
    (received,) = read(bytes_of(encode(pack(message, InMessage()))))
    assert isinstance(received, RelayedStep)
    unpacked, hidden = unpack(received, InMessage())

    assert are_equal(replace(unpacked, hidden=None if hidden is None else hidden()), message)


@settings(max_examples=40)
@given(st.lists(step_inputs, max_size=3), st.integers(1, 50))
def test_messages_in_a_row_arrive_in_pieces_of_any_size(messages: list[Message], piece_bytes: int):
    received = read(b"".join(bytes_of(encode(message)) for message in messages), piece_bytes=piece_bytes)

    assert len(received) == len(messages)
    assert all(map(are_equal, received, messages))


def test_large_arrays_are_neither_copied_to_send_nor_after_they_are_received():
    hidden = torch.randn(1000, 64)
    relayed = pack(StageMessage(step=STEP, hidden=hidden), InMessage())
    frame = encode(relayed)
    reader = FrameReader()
    for _ in range(2):
        block = reader.missing
        data = bytes_of(frame)
        block[:] = data[16:][: len(block)] if len(block) > 16 else data[:16]
        message = reader.advance(len(block))
    assert isinstance(message, RelayedStep)
    _, wait = unpack(message, InMessage())
    assert wait is not None
    received = wait()

    assert any(np.shares_memory(np.frombuffer(piece, np.uint8), hidden.numpy()) for piece in frame)
    assert np.shares_memory(received.numpy(), np.frombuffer(block, np.uint8))
    assert torch.equal(received, hidden)
    received.zero_()  # it is writable, as is what torch takes over without a warning
    message.step.token_ids[:] = 0


@settings(max_examples=40)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_incomplete(data: bytes):
    refused_or_nothing(data)


@settings(max_examples=40)
@given(st.binary(max_size=80), st.binary(max_size=40))
def test_random_headers_and_bodies_are_refused(header: bytes, body: bytes):
    refused_or_nothing(frame_of(header, body))


_trees = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**70) | st.floats() | st.text(max_size=3),
    lambda trees: st.lists(trees, max_size=14) | st.dictionaries(st.text(max_size=2), trees, max_size=2),
)


@settings(max_examples=40)
@given(st.sampled_from(["StepInput", "StepOutput", "RelayedStep", "StageTiming", "os.system"]), _trees, st.binary())
def test_random_content_of_known_types_is_refused(name: str, tree: object, body: bytes):
    refused_or_nothing(frame_of([name, tree], body))


@settings(max_examples=40)
@given(stage_messages, st.data())
def test_a_message_cut_short_or_changed_is_refused_or_another_message(message: StageMessage, data: st.DataObject):
    good = bytearray(bytes_of(encode(pack(message, InMessage()))))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    refused_or_nothing(bytes(good))
    refused_or_nothing(bytes(good[: data.draw(st.integers(0, len(good)))]))


def refused_or_nothing(data: bytes) -> None:
    """Read and unpack `data`; whatever it is, nothing but a WireError comes of it."""
    with contextlib.suppress(WireError):
        for message in read(data):
            if isinstance(message, RelayedStep):
                unpack(message, InMessage())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame_of([], magic=b"GET "), "begins with b'SRTH', got b'GET '"),
        (struct.pack("<4sIQ", b"SRTH", 0, 0), "got 0 and 0"),
        (struct.pack("<4sIQ", b"SRTH", MAX_HEADER_BYTES + 1, 0), "a header of 1 to"),
        (struct.pack("<4sIQ", b"SRTH", 2, MAX_BODY_BYTES + 1), "a body of at most"),
        (frame_of(b"\x80\x04"), "not JSON"),
        (frame_of(b"[" * 200_000), "not JSON"),
        (frame_of(["Popen", []]), "holds one of"),
        (frame_of(["StepOutput", [1, 0]]), "StepOutput has 8 fields, got 2"),
        (frame_of(["StepOutput", [2**63, 0, 0, [], [], [], [], None]]), "64 bits"),
        (frame_of(["StepOutput", [1, True, 0, [], [], [], [], None]]), "StepOutput.epoch should hold .* int"),
        (frame_of(["StepOutput", [1, 0, 6, [], [], [], [], None]], bytes(6)), "no multiple of 4"),
        (frame_of(["StepOutput", [1, 0, -4, [], [], [], [], None]]), "no multiple of 4"),
        (frame_of(["StepOutput", [1, 0, 8, [], [], [], [], None]], bytes(4)), "ends at byte 8 of 4"),
        (frame_of(["StepOutput", [1, 0, 4, [], [], [], [], None]], bytes(8)), "end at byte 4 of 8"),
        (frame_of(["StepOutput", [1, 0, 0, [[1]], [], [], [], None]]), "pairs, got one of 1"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(data: bytes, message: str):
    with pytest.raises(WireError, match=message):
        read(data)


@pytest.mark.parametrize(
    "activation",
    [
        Activation(shape=(2, 2), dtype="float32", data=np.zeros(12, np.uint8)),
        Activation(shape=(2, 2), dtype="float32", data=None),
        Activation(shape=(2, 2), dtype="qint8", data=np.zeros(4, np.uint8)),
        Activation(shape=(4,), dtype="float32", data=np.zeros(16, np.uint8)),
        Activation(shape=(-2, -2), dtype="float32", data=np.zeros(16, np.uint8)),
        Activation(shape=(2**30, 2**30), dtype="float32", data=np.zeros(16, np.uint8)),
    ],
)
def test_hidden_states_that_their_bytes_cannot_be_are_refused(activation: Activation):
    relayed = RelayedStep(step=STEP, hidden=activation, timings=(), fault=None)
    with pytest.raises(WireError, match="hidden states"):
        unpack(relayed, InMessage())


def test_what_is_too_large_is_not_sent():
    history = TokenHistory(row=0, prompt_token_ids=np.empty(0, np.int32), output_token_ids=np.empty(0, np.int32))
    with pytest.raises(WireError, match=f"the most are {MAX_BUFFERS}"):
        encode(replace(STEP, histories=(history,) * MAX_BUFFERS))
    with pytest.raises(WireError, match=f"the most are {MAX_HEADER_BYTES}"):
        encode(replace(STEP, request_ids=("x" * MAX_HEADER_BYTES,)))


@pytest.mark.parametrize(
    "step",
    [
        replace(STEP, token_ids=np.zeros(3, np.int64)),
        replace(STEP, token_ids=np.zeros((1, 3), np.int32)),
        replace(STEP, step_id=np.int64(1)),
    ],
    ids=["dtype", "shape", "numpy-scalar"],
)
def test_what_the_other_end_would_refuse_is_not_sent(step: StepInput):
    with pytest.raises(WireError, match="StepInput"):
        encode(step)
