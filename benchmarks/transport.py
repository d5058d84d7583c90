"""Round trip of a step through stages that compute nothing, a process each: sockets without pickle, and with it.

python benchmarks/transport.py [--json PATH]
"""

import argparse
import asyncio
import multiprocessing
import pickle
import resource
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import write_report

from rayserve_sarathi.execution.activations import InMessage, pack, unpack
from rayserve_sarathi.execution.codec import ByteArray
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.socket_pipeline import SocketEndpoint, open_endpoint
from rayserve_sarathi.execution.socket_stage import SocketStage
from rayserve_sarathi.execution.sockets import Address, Listener
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import PREFIX, Message, RelayedStep, decode, encode
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import SAMPLING_DTYPE, StageTiming, StepInput, StepOutput, pack_sampling

HOST = "127.0.0.1"
NUM_DECODES, CONTEXT, BLOCK_SIZE = 64, 1024, 16
HIDDEN_BYTES = 8 << 20
NUM_WARM_UP, NUM_SMALL, NUM_LARGE, NUM_ENCODE = 50, 2000, 200, 2000
IDLE_S = 10.0
_SIZE = struct.Struct("<Q")


def make_step(step_id: int) -> StepInput:
    """Return a step of decodes only, each with a block table of its context."""
    tokens = np.arange(NUM_DECODES, dtype=np.int32)
    num_blocks = CONTEXT // BLOCK_SIZE
    row = pack_sampling(SamplingParams(temperature=0.8, top_p=0.95))
    return StepInput(
        step_id=step_id,
        epoch=0,
        request_ids=tuple(f"cmpl-{index:032x}" for index in range(NUM_DECODES)),
        token_ids=tokens,
        query_lens=np.ones(NUM_DECODES, np.int32),
        context_lens=np.full(NUM_DECODES, CONTEXT - 1, np.int32),
        block_tables=np.arange(NUM_DECODES * num_blocks, dtype=np.int32),
        num_blocks=np.full(NUM_DECODES, num_blocks, np.int32),
        sample_requests=tokens,
        sampling=np.frombuffer(bytearray(row * NUM_DECODES), dtype=SAMPLING_DTYPE),
    )


class NoStage:
    """Passes on `hidden_bytes` of hidden states, or a token for each request."""

    def __init__(self, index: int, *, is_last: bool, hidden_bytes: int) -> None:
        self._index = index
        self._is_last = is_last
        self._hidden = torch.zeros(NUM_DECODES, hidden_bytes // NUM_DECODES // 2, dtype=torch.bfloat16)

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        """See `Stage`."""
        now_s = time.monotonic()
        timing = StageTiming(stage=self._index, receive_s=receive_s or now_s, start_s=now_s, end_s=now_s)
        timings = (*message.timings, timing)
        if not self._is_last:
            hidden = self._hidden if message.hidden is None else message.hidden
            return replace(message, hidden=hidden, timings=timings)
        step = message.step
        return StepOutput(
            step_id=step.step_id, epoch=0, token_ids=np.zeros(len(step.sample_requests), np.int32), timings=timings
        )


def run_stage(pipe: Pipe, index: int, is_last: bool, hidden_bytes: int, secret: bytes) -> None:
    """Be a stage of `SocketStage`, in a process of its own."""
    torch.set_num_threads(1)
    executor = NoStage(index, is_last=is_last, hidden_bytes=hidden_bytes)
    stage = SocketStage(executor, name=f"stage {index}", host=HOST, secret=secret, epoch=0)
    pipe.send(stage.address)
    stage.connect(pipe.recv())
    threading.Thread(target=answer, args=(pipe,), daemon=True).start()
    stage.run()


def run_pickle_stage(pipe: Pipe, index: int, is_last: bool, hidden_bytes: int, secret: bytes) -> None:
    """Be a stage that pickles its messages, in one thread."""
    torch.set_num_threads(1)
    executor = NoStage(index, is_last=is_last, hidden_bytes=hidden_bytes)
    with socket.create_server((HOST, 0)) as listener:
        pipe.send(listener.getsockname()[:2])
        with socket.create_connection(pipe.recv()) as downstream:
            upstream, _ = listener.accept()
            for sock in (upstream, downstream):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(pipe,), daemon=True).start()
            with upstream:
                while (message := receive_pickle(upstream)) is not None:
                    if isinstance(message, StepInput):
                        message = StageMessage(step=message)
                    assert isinstance(message, StageMessage)
                    send_pickle(downstream, executor.launch(message))


def answer(pipe: Pipe) -> None:
    """Tell how many seconds of CPU this process has taken, each time that it is asked."""
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(usage.ru_utime + usage.ru_stime)


def send_pickle(sock: socket.socket, message: object) -> None:
    """Send one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sock.sendmsg([_SIZE.pack(len(data))], [], socket.MSG_MORE)
    sock.sendall(data)


def receive_pickle(sock: socket.socket) -> object:
    """Wait for a message; None at the end."""
    if not (prefix := sock.recv(_SIZE.size, socket.MSG_WAITALL)):
        return None
    data = bytearray(_SIZE.unpack(prefix)[0])
    view = memoryview(data)
    while view:
        view = view[sock.recv_into(view) :]
    return pickle.loads(data)


@contextmanager
def stages(
    target: Callable[..., None], num_stages: int, *, last: Address, hidden_bytes: int, secret: bytes
) -> Iterator[tuple[Address, list[Pipe]]]:
    """Start stages and join them to `last`; yield where the first listens, and a pipe to each."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for index in range(num_stages):
        ours, theirs = context.Pipe()
        arguments = (theirs, index, index == num_stages - 1, hidden_bytes, secret)
        processes.append(context.Process(target=target, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe, address in zip(pipes, [*addresses[1:], last], strict=True):
        pipe.send(address)
    try:
        yield addresses[0], pipes
    finally:
        for process in processes:
            process.join()


def cpu_s(pipes: list[Pipe]) -> float:
    """Return the CPU time of all stages, in seconds."""
    for pipe in pipes:
        pipe.send(None)
    return float(sum(pipe.recv() for pipe in pipes))


async def measure_sockets(num_stages: int, *, hidden_bytes: int, num_steps: int, idle_s: float) -> dict[str, float]:
    """Return round trips through `SocketStage`s, and what they cost when there is nothing to do."""
    secret = make_secret()
    listener = Listener(HOST, secret=secret)
    with stages(run_stage, num_stages, last=listener.address, hidden_bytes=hidden_bytes, secret=secret) as (
        first,
        pipes,
    ):
        endpoint = await open_endpoint(listener, [first], secret=secret, epoch=0, timeout_s=60)
        times_s = [await round_trip(endpoint, make_step(step_id)) for step_id in range(NUM_WARM_UP + num_steps)]
        figures = quantiles_ms(times_s[NUM_WARM_UP:])
        if idle_s:
            begin_s, begin_cpu_s = time.monotonic(), cpu_s(pipes)
            await asyncio.sleep(idle_s)
            idle_cpu_s = cpu_s(pipes) - begin_cpu_s
            figures["idle_stage_cpu_percent"] = 100 * idle_cpu_s / num_stages / (time.monotonic() - begin_s)
        await endpoint.close()
    return figures


async def round_trip(endpoint: SocketEndpoint, step: StepInput) -> float:
    """Return how long a step takes through all stages, in seconds."""
    begin_s = time.perf_counter()
    await endpoint.submit(step)
    await endpoint.receive()
    return time.perf_counter() - begin_s


def measure_pickle(num_stages: int, *, hidden_bytes: int, num_steps: int) -> dict[str, float]:
    """Return the same with pickle."""
    with (
        socket.create_server((HOST, 0)) as listener,
        stages(
            run_pickle_stage, num_stages, last=listener.getsockname()[:2], hidden_bytes=hidden_bytes, secret=b""
        ) as (address, _),
    ):
        times_s = []
        with socket.create_connection(address) as first, listener.accept()[0] as last:
            first.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for step_id in range(NUM_WARM_UP + num_steps):
                step = make_step(step_id)
                begin_s = time.perf_counter()
                send_pickle(first, step)
                receive_pickle(last)
                times_s.append(time.perf_counter() - begin_s)
    return quantiles_ms(times_s[NUM_WARM_UP:])


def quantiles_ms(times_s: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    return {"ms_p50": statistics.median(times_s) * 1e3, "ms_p99": statistics.quantiles(times_s, n=100)[98] * 1e3}


def measure_encoding() -> dict[str, float]:
    """Return microseconds to encode and decode each kind of message, and the same with pickle."""
    step = make_step(0)
    small = StageMessage(step=step, hidden=torch.zeros(NUM_DECODES, 4096, dtype=torch.bfloat16))
    large = replace(small, hidden=torch.zeros(NUM_DECODES, HIDDEN_BYTES // NUM_DECODES // 2, dtype=torch.bfloat16))
    output = StepOutput(step_id=0, epoch=0, token_ids=np.zeros(NUM_DECODES, np.int32))
    figures: dict[str, float] = {}
    for name, message in (("step_input", step), ("hidden_512k", small), ("hidden_8m", large), ("step_output", output)):
        num_times = NUM_ENCODE if message is not large else NUM_ENCODE // 20
        frame = b"".join(encode(pack_any(message)))
        header_bytes = PREFIX.unpack_from(frame)[1]
        block = np.frombuffer(bytearray(frame[PREFIX.size :]), np.uint8)
        pickled = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        calls: dict[str, Callable[[], object]] = {
            "encode": partial(encode_any, message),
            "decode": partial(decode_any, block, header_bytes),
            "pickle": partial(pickle.dumps, message, protocol=pickle.HIGHEST_PROTOCOL),
            "unpickle": partial(pickle.loads, pickled),
        }
        figures |= {f"{verb}_{name}_us": time_us(call, num_times) for verb, call in calls.items()}
    return figures


def pack_any(message: StageMessage | StepInput | StepOutput) -> Message:
    """Return what goes over the socket."""
    return pack(message, InMessage()) if isinstance(message, StageMessage) else message


def encode_any(message: StageMessage | StepInput | StepOutput) -> None:
    """Make a frame."""
    encode(pack_any(message))


def decode_any(block: ByteArray, header_bytes: int) -> None:
    """Take a frame apart that was received."""
    message = decode(block, header_bytes)
    if isinstance(message, RelayedStep):
        _, wait = unpack(message, InMessage())
        assert wait is not None
        wait()


def time_us(call: Callable[[], object], num_times: int) -> float:
    """Return the median time of a call, in microseconds."""
    times_s = []
    for _ in range(num_times):
        begin_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s) * 1e6


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for num_stages in (2, 4):
        for size, hidden_bytes, num_steps in (("small", 0, NUM_SMALL), ("8m", HIDDEN_BYTES, NUM_LARGE)):
            idle_s = IDLE_S if size == "small" else 0.0
            sockets = asyncio.run(
                measure_sockets(num_stages, hidden_bytes=hidden_bytes, num_steps=num_steps, idle_s=idle_s)
            )
            pickled = measure_pickle(num_stages, hidden_bytes=hidden_bytes, num_steps=num_steps)
            figures |= {f"sockets_{num_stages}_stages_{size}_{name}": value for name, value in sockets.items()}
            figures |= {f"pickle_{num_stages}_stages_{size}_{name}": value for name, value in pickled.items()}
    write_report(figures | measure_encoding(), path=arguments.json)


if __name__ == "__main__":
    main()
