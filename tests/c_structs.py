"""The structs of the C interface in ctypes, laid out by hand, and calls of its functions."""

from __future__ import annotations

import ctypes

POINTER, F64, I32, I64 = ctypes.c_void_p, ctypes.c_double, ctypes.c_int32, ctypes.c_int64


def struct(name: str, *fields: tuple[type, str]) -> type[ctypes.Structure]:
    """A struct with fields of each type, by their names."""
    listed = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


def call_struct(name: str, *fields: tuple[type, str]) -> type[ctypes.Structure]:
    """The struct of a call, with the fields that all of them begin with."""
    return struct(
        name, (I64, "size"), (POINTER, "workspace"), (I64, "workspace_bytes"), (I32, "num_threads"), *fields
    )


# As nabla_fast.h has them. Programs are compiled against this order: what is here stays where it is.
Matrix = struct("nabla_fast_matrix", (POINTER, "data"), (I64, "width stride"), (I32, "dtype"))
Output = struct("nabla_fast_output", (POINTER, "data"), (I64, "width stride"), (I32, "dtype"))
Heads = struct("nabla_fast_heads", (POINTER, "data"), (I64, "batch_stride head_stride token_stride"))
HeadsOutput = struct(
    "nabla_fast_heads_output", (POINTER, "data"), (I64, "batch_stride head_stride token_stride")
)
HeadMap = struct("nabla_fast_head_map", (POINTER, "bias"), (F64, "scale softcap"))
Pool = struct("nabla_fast_pool", (POINTER, "data"), (I64, "block_stride token_stride head_stride"))
StatsArgs = call_struct(
    "nabla_fast_stats_args",
    (I64, "rows vocab"),
    (Matrix, "logits hidden head"),
    (F64, "tau"),
    (POINTER, "logsumexp confidence entropy argmax row_status"),
    (HeadMap, "head_map"),
)
DrawArgs = call_struct(
    "nabla_fast_draw_args",
    (I64, "rows vocab"),
    (Matrix, "logits"),
    (POINTER, "seed start visit position"),
    (I32, "redraw"),
    (F64, "tau"),
    (I64, "top_k"),
    (F64, "top_p"),
    (POINTER, "token row_status"),
)
LmLogitsArgs = call_struct(
    "nabla_fast_lm_logits_args",
    (I64, "rows vocab"),
    (Matrix, "hidden head"),
    (Output, "logits"),
    (HeadMap, "head_map"),
)
NllGradArgs = call_struct(
    "nabla_fast_nll_grad_args",
    (I64, "rows vocab"),
    (Matrix, "hidden head"),
    (POINTER, "targets"),
    (Output, "grad"),
    (POINTER, "row_status"),
    (HeadMap, "head_map"),
)
DescentArgs = call_struct(
    "nabla_fast_descent_args",
    (I64, "rows vocab"),
    (Output, "parameter exp_avg exp_avg_sq"),
    (POINTER, "step"),
    (Matrix, "head grad"),
    (POINTER, "schedule"),
    (I64, "iters schedule_stride"),
    (POINTER, "until group"),
    (F64, "tau"),
    (POINTER, "noise_seed noise_position token flipped row_status"),
    (HeadMap, "head_map"),
)
MixArgs = call_struct(
    "nabla_fast_mix_args",
    (I64, "rows vocab"),
    (Matrix, "logits hidden head"),
    (F64, "tau"),
    (POINTER, "noise_seed noise_position"),
    (I64, "table_count"),
    (POINTER, "tables row_status"),
    (I32, "hard"),
    (POINTER, "mixes cotangents"),
    (Matrix, "direct"),
    (Output, "grad"),
    (POINTER, "perturbed"),
)
OnehotArgs = call_struct(
    "nabla_fast_onehot_args",
    (I64, "rows vocab"),
    (Matrix, "hidden head"),
    (F64, "nll_coeff"),
    (I64, "table_count"),
    (POINTER, "cotangents tables token_maps table_rows row_status"),
    (Output, "grad"),
    (POINTER, "norm"),
    (HeadMap, "head_map"),
)
AttentionArgs = call_struct(
    "nabla_fast_attention_args",
    (I64, "batch heads kv_heads suffix dim blocks block_size table_width window"),
    (F64, "scale"),
    (Heads, "q k v"),
    (Pool, "key_pool value_pool"),
    (POINTER, "block_tables"),
    (I64, "table_stride"),
    (POINTER, "prefix_lengths"),
    (HeadsOutput, "output"),
    (Heads, "cotangent"),
    (HeadsOutput, "dq dk dv"),
    (POINTER, "logsumexp"),
    (F64, "softcap"),
    (POINTER, "sinks"),
)
STRUCTS = [Matrix, Output, Heads, HeadsOutput, HeadMap, Pool, StatsArgs, DrawArgs, LmLogitsArgs]
STRUCTS += [NllGradArgs, DescentArgs, MixArgs, OnehotArgs, AttentionArgs]
