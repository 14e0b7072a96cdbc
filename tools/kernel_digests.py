"""``python -m tools.kernel_digests``: digests of the C++ kernels' results, to compare two builds.

Every op with a C++ backend runs on the same random inputs at every instruction set that this CPU has.
``--output FILE`` writes the digests; ``--compare FILE`` reads those of another build and exits 1 where a
kernel's bits differ. Another compiler may contract or vectorize sums in another way, so digests are
compared between builds of one compiler. ``--extension FILE`` takes another build than the installed one,
such as that of ``make emulate``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nabla_fast import _native, ops
from nabla_fast.models.reader import PagedReader

F32, BF16 = torch.float32, torch.bfloat16
Run = Callable[[], Any]


def normal(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times ``scale``, from the global generator."""
    return (torch.randn(shape) * scale).to(dtype)


def masked(logits: Tensor) -> Tensor:
    """Logits [N, V] of which about a fifth are −inf, the first one never."""
    mask = torch.rand(logits.shape) < 0.2
    mask[:, 0] = False
    return logits.masked_fill(mask, -torch.inf)


def noise(rows: int) -> ops.GumbelNoise:
    """Keys of Gumbel noise for N rows."""
    return ops.GumbelNoise(torch.arange(rows) * 7 - 3, torch.arange(rows) + 2**33)


def mixes(rows: int, vocabulary: int, dtype: torch.dtype, noisy: bool) -> Iterator[tuple[str, Run]]:
    """Both mixes and their gradients, hard and soft."""
    tables = [normal(vocabulary, width, dtype=dtype) for width in (72, 33)]
    head = normal(vocabulary, 48, dtype=dtype)
    options = {
        "tau": 0.7,
        "noise": noise(rows) if noisy else None,
        "direct": normal(rows, vocabulary) if noisy else None,
    }
    cotangents = [normal(rows, table.shape[1]) for table in tables]
    for hard in (True, False):
        for name, op, inputs in (
            ("embedding_mix", ops.embedding_mix, (masked(normal(rows, vocabulary, scale=3.0)),)),
            ("linear_embedding_mix", ops.linear_embedding_mix, (normal(rows, 48, scale=0.4), head)),
        ):

            def run(op: Any = op, inputs: Sequence[Tensor] = inputs, hard: bool = hard) -> list[Tensor]:
                parameter = inputs[0].clone().requires_grad_()
                found = op(parameter, *inputs[1:], tables, hard=hard, **options)
                loss = sum((mix.float() * c).sum() for mix, c in zip(found, cotangents, strict=True))
                return [*(mix.detach() for mix in found), *torch.autograd.grad(loss, parameter)]

            yield f"{name} {'hard' if hard else 'soft'}{' noise' if noisy else ''}", run


def descents(rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """Both descents, rows by themselves and in groups, with noise."""
    z, h = masked(normal(rows, vocabulary, scale=2.0)), normal(rows, 48, scale=0.4)
    head, grad = normal(vocabulary, 48, dtype=dtype), normal(rows, vocabulary)
    schedule = ops.cosine_schedule(6, 0.05)
    for group in (None, torch.arange(rows) // 2):
        for latents in (False, True):

            def run(group: Tensor | None = group, latents: bool = latents) -> list[Tensor]:
                parameter = (h if latents else z).clone()
                state = ops.AdamState.zeros(parameter)
                options = {"group": group, "noise": noise(rows), "tau": 1.3}
                if latents:
                    found = ops.dto_descent_latents(parameter, head, grad, state, schedule, **options)
                else:
                    found = ops.dto_descent(parameter, grad, state, schedule, **options)
                return [parameter, *state, *found]

            yield f"dto_descent{'_latents' if latents else ''}{'' if group is None else ' groups'}", run


def rows_of_products(rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """Products over the vocabulary, statistics and one-hot gradients."""
    hidden, head = normal(rows, 72, scale=0.3), normal(vocabulary, 72, dtype=dtype)
    tables = [normal(vocabulary, 40, dtype=dtype), normal(vocabulary // 2 + 1, 24, dtype=dtype)]
    maps = [None, torch.randint(0, vocabulary // 2 + 1, (vocabulary,))]
    small = [normal(rows, table.shape[1]) for table in tables]
    logits = masked(normal(rows, vocabulary, dtype=dtype, scale=3.0))
    tokens = torch.randint(0, vocabulary, (rows,))
    one_hot = (small, tables, hidden, head)
    zero = torch.zeros(rows, dtype=torch.int64)
    key = ops.DrawKey(zero + 42, zero, zero, torch.arange(rows))
    yield "draw_tokens", lambda: ops.draw_tokens(logits, key, temperature=0.7)
    yield "draw_tokens filtered", lambda: ops.draw_tokens(logits, key, top_k=20, top_p=0.8)
    yield "token_stats", lambda: ops.token_stats(logits, tau=0.7)
    yield "token_stats of hidden", lambda: ops.token_stats(hidden, head, tau=0.7)
    yield "lm_logits", lambda: ops.lm_logits(hidden, head)
    yield "nll_grad", lambda: ops.nll_grad(hidden, head, tokens)
    yield "onehot_grad", lambda: ops.onehot_grad(*one_hot, nll_coeff=0.1, token_maps=maps)
    yield "onehot_grad_norm", lambda: ops.onehot_grad_norm(*one_hot, nll_coeff=0.1, token_maps=maps)


def attention(suffix: int, window: int | None) -> Iterator[tuple[str, Run]]:
    """Suffixes of two sequences over paged prefixes, and their gradient."""
    pools = [normal(9, 16, 2, 32) for _ in range(2)]
    q, k, v = normal(2, 6, suffix, 32), normal(2, 2, suffix, 32), normal(2, 2, suffix, 32)
    tables, lengths = torch.tensor([[3, 1, 7], [8, 0, 2]]), torch.tensor([41, 17])
    cotangent = normal(2, 6, suffix, 32)

    def run() -> list[Tensor]:
        given = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        output, _ = ops.prefix_attention(*given, *pools, tables, lengths, scale=0.2, window=window)
        return [output.detach(), *torch.autograd.grad((output * cotangent).sum(), given)]

    yield f"prefix_attention S={suffix} window={window}", run


def decoder_pass() -> Iterator[tuple[str, Run]]:
    """The pass of a Llama-type decoder, and its gradient."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    reader = PagedReader(LlamaForCausalLM(config).eval().requires_grad_(False))
    embeddings = normal(2, 7, 64)

    def run() -> list[Tensor]:
        given = embeddings.clone().requires_grad_()
        pool = reader.pool(4)
        states = reader.read([pool.sequence(), pool.sequence()], [7, 5], embeddings=given)
        return [states.detach(), *torch.autograd.grad(states[:, :5].square().sum(), given)]

    yield "Llama pass", run


def runs() -> Iterator[tuple[str, Run]]:
    """(name, call) of everything that is digested; inputs are drawn in this order."""
    torch.manual_seed(0)
    for rows, vocabulary in ((1, 4099), (5, 257), (16, 1031), (37, 515), (70, 130), (3, 1)):
        for dtype in (F32, BF16):
            where = f"N={rows} V={vocabulary} {str(dtype).removeprefix('torch.')}"
            for noisy in (False, True):
                yield from ((f"{name} {where}", run) for name, run in mixes(rows, vocabulary, dtype, noisy))
            yield from ((f"{name} {where}", run) for name, run in descents(rows, vocabulary, dtype))
            yield from ((f"{name} {where}", run) for name, run in rows_of_products(rows, vocabulary, dtype))
    for suffix in (1, 9, 40):
        for window in (None, 12):
            yield from attention(suffix, window)
    yield from decoder_pass()


def digest(result: Any) -> str:
    """SHA-256 of the bits of a tensor, or of tensors one after another."""
    found = hashlib.sha256()
    for tensor in [result] if isinstance(result, Tensor) else result:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def use_extension(path: Path) -> None:
    """Takes the file for ``nabla_fast._C``; before anything has called that."""
    spec = importlib.util.spec_from_file_location("nabla_fast._C", path)
    sys.modules["nabla_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["nabla_fast._C"])


def digests() -> dict[str, dict[str, str]]:
    """Digests by instruction set and call."""
    native = _native.extension()
    best = native.cpu_isa()
    calls = list(runs())
    found: dict[str, dict[str, str]] = {}
    try:
        for level in range(best + 1):
            native.limit_cpu_isa(level)
            with ops.use_backend("cpu", "torch"):
                found[_native.ISA_NAMES[level]] = {name: digest(run()) for name, run in calls}
    finally:
        native.limit_cpu_isa(best)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the digests as JSON")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="digests of another build")
    parser.add_argument("--extension", type=Path, metavar="FILE", help="another build of the extension")
    arguments = parser.parse_args(argv)
    if arguments.extension:
        use_extension(arguments.extension)
    found = digests()
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    count = sum(map(len, found.values()))
    print(f"{count} digests at {', '.join(found)}")
    if arguments.compare is None:
        return 0
    former = json.loads(arguments.compare.read_text())
    different = [
        f"{level}: {name}"
        for level in found
        for name, value in found[level].items()
        if level in former and former[level].get(name) != value
    ]
    print("\n".join([*different, f"{len(different)} differ"]))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
