"""Drive OpenVINO GenAI's continuous batching in this process: python drive_openvino.py FOLDER, a job a line on stdin.

It runs in OpenVINO's own environment, so it imports nothing of ours. A job is a JSON object with `prompts`, lists of
token ids, and the fields of a workload; the answer is one line of JSON.
"""

import itertools
import json
import sys
import time

import numpy as np
import openvino
import openvino_genai


class Driver:
    """A pipeline and the requests in it."""

    def __init__(self, folder: str, cache_gb: int) -> None:
        settings = openvino_genai.SchedulerConfig()
        settings.cache_size = cache_gb
        settings.max_num_batched_tokens = 256
        settings.max_num_seqs = 64
        settings.dynamic_split_fuse = True
        settings.enable_prefix_caching = False
        properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, settings, "CPU", properties)
        self._ids = itertools.count()

    def add(self, prompt: list[int], num_tokens: int) -> object:
        """Begin a greedy request of a fixed length; return its handle."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(next(self._ids), tensor, config)

    def step(self) -> float:
        """Compute a step; return when it ended."""
        self._pipeline.step()
        return time.perf_counter()

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the tokens after a prompt."""
        handle = self.add(prompt, num_tokens)
        tokens: list[int] = []
        while self._pipeline.has_non_finished_requests():
            self.step()
            tokens += _read(handle)
        return tokens

    def run(self, prompts: list[list[int]], num_tokens: int, num_clients: int) -> dict[str, float]:
        """Serve a closed loop; return its seconds."""
        waiting = list(prompts)[::-1]
        open_requests: list[list] = []
        begin_s = time.perf_counter()
        while waiting or open_requests:
            while waiting and len(open_requests) < num_clients:
                open_requests.append([self.add(waiting.pop(), num_tokens), num_tokens])
            self.step()
            for request in open_requests:
                request[1] -= len(_read(request[0]))
            open_requests = [request for request in open_requests if request[1] > 0]
        return {"seconds": time.perf_counter() - begin_s}

    def interfere(self, job: dict) -> dict[str, list[float]]:
        """Serve running decodes and long prompts; return the gaps of the running ones in seconds."""
        prompts, long_prompts = itertools.cycle(job["prompts"]), itertools.cycle(job["long_prompts"])
        gaps: list[float] = []
        running: list[list] = []  # handle, tokens left, time of the last token
        long_ones = []  # a handle that is dropped takes its request along
        begin_s = time.perf_counter()
        next_long_s = begin_s + job["period_s"]
        while (now_s := time.perf_counter()) < begin_s + job["duration_s"]:
            while len(running) < job["num_decoding"]:
                running.append([self.add(next(prompts), job["num_output_tokens"]), job["num_output_tokens"], None])
            if now_s >= next_long_s:
                next_long_s += job["period_s"]
                long_ones.append(self.add(next(long_prompts), job["long_output_tokens"]))
            end_s = self.step()
            for request in running:
                for _ in _read(request[0]):
                    if request[2] is not None:
                        gaps.append(end_s - request[2])
                    request[1], request[2] = request[1] - 1, end_s
            running = [request for request in running if request[1] > 0]
        while self._pipeline.has_non_finished_requests():
            self.step()
        answered = sum(len(_read(handle)) == job["long_output_tokens"] for handle in long_ones)
        if answered < len(long_ones):
            raise RuntimeError(f"{answered} of {len(long_ones)} long prompts were answered")
        return {"gaps_s": gaps}


def _read(handle: object) -> list[int]:
    tokens: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            tokens += output.generated_ids
    return tokens


def main() -> None:
    """Answer jobs until the input ends."""
    driver = Driver(sys.argv[1], cache_gb=2)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        job = json.loads(line)
        if job["kind"] == "generate":
            answer = {"token_ids": driver.generate(job["prompt"], job["num_tokens"])}
        elif job["kind"] == "interfere":
            answer = driver.interfere(job)
        else:
            answer = driver.run(job["prompts"], job["num_tokens"], job["num_clients"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
