"""A process forked while threads decode: its locks, models and streams are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")

# In a process of its own: a fork of the test process would have all its threads' locks.
SCRIPT = """
import os, signal, sys, threading
import torch
from tiny_models import causal_lm, reward_model
from nabla_fast import DTOConfig, NablaDecoder

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may ignore it
loop = sys.argv[1]
lm, rm = causal_lm("qwen2").train(), reward_model("qwen2").train()
rm.score.requires_grad_(False)
calls, inside, go_on = [], threading.Event(), threading.Event()


def wait(*_):
    if threading.current_thread() is not threading.main_thread():
        calls.append(1)
        if len(calls) == int(sys.argv[2]):
            inside.set()
            go_on.wait(60)


for model in (lm, rm):
    model.base_model.register_forward_pre_hook(wait)
config = DTOConfig(iters=2, lr=1.0, confidence_threshold=None, max_generations=3)
decoder = NablaDecoder(lm, rm, None, config=config, loop=loop, batch_size=2)
prompts = [[5, 9, 3], [7], [6, 6]]


def tokens(results):
    return [result.token_ids for result in results]


def flags():
    models = lm, rm
    return (
        [module.training for model in models for module in model.modules()],
        [weight.requires_grad for model in models for weight in model.parameters()],
        [model.config._attn_implementation for model in models],
    )


before = flags()
want = tokens(decoder.generate(prompts, max_new_tokens=4))
stream = decoder.stream(prompts, max_new_tokens=4)
first, result = next(stream)
found = {first: result.token_ids}

worker = threading.Thread(target=lambda: found.update((n, r.token_ids) for n, r in stream), daemon=True)
worker.start()
if not inside.wait(30):
    print("fewer passes than that")
    os._exit(3)
child = os.fork()
if not child:
    signal.alarm(40)
    wrong = []
    if flags() != before:
        wrong.append("flags are the other thread's")
    if tokens(decoder.generate(prompts, max_new_tokens=4)) != want:
        wrong.append("other tokens")
    rest = {n: r.token_ids for n, r in stream}
    if {**{first: want[first]}, **rest} != dict(enumerate(want)) or first in rest:
        wrong.append(f"the stream goes on with {rest}")
    stream.close()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        wrong.append("the handler of SIGINT")
    sys.stdout.write(", ".join(wrong) or "right")
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
go_on.set()
worker.join(60)
print(f"; status {status}; parent", "right" if found == dict(enumerate(want)) else found)
"""


@pytest.mark.parametrize(("loop", "passes"), [("sequential", 2), ("sequential", 9), ("batched", 1)])
def test_a_child_decodes_while_a_thread_of_its_parent_does(loop: str, passes: int):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, loop, str(passes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == "right; status 0; parent right\n", done.stderr
