/* C interface of nabla_fast for CUDA devices: the structs of nabla_fast.h, and a stream.
 *
 * What nabla_fast.h says of every function holds here too, but for this:
 *
 *   memory      What a struct's matrices and arrays point to is the device's, the workspace and
 *               row_status too. The structs themselves, and the arrays of matrices that they point
 *               to (tables, mixes, cotangents), are the host's and are copied before a function
 *               returns.
 *   streams     Functions put kernels into a stream and return; they wait for nothing and allocate
 *               nothing. Results are there when the stream has come so far. (Where cuBLASLt is there,
 *               it makes products, and keeps a handle for each device and what it has chosen for each
 *               shape; the first call of a device is not for a time at which a stream is captured.)
 *   rows        A row that is not OK has its status in row_status; its results are NaN. No function
 *               answers NABLA_FAST_BAD_ROWS.
 *   elements    May be float16 as well. Soft mixes multiply tables in float32 or bf16 by weights of
 *               at most 2^-20: entries below 2^-106 lose digits, and sums stay finite whatever the
 *               entries are in vocabularies of up to 2^20 tokens.
 *   dtypes      Mixes may have any dtype.
 *   results     The same call on the same device has the same bits. A row's may depend in the last
 *               bits on how many rows are in the call.
 *   threads     num_threads is not read.
 *   sizes       A vocabulary has at most 2^30 tokens.
 *
 * They are in libnabla_fast_cuda.so, which `make cuda` builds: docs/cuda.md. No GPU has run them yet.
 */
#ifndef NABLA_FAST_CUDA_H_
#define NABLA_FAST_CUDA_H_

#include "nabla_fast.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Beside the dtypes of nabla_fast.h: IEEE 754 half precision, held in a uint16_t. */
enum { NABLA_FAST_FLOAT16 = 2 };

/* Beside the statuses of nabla_fast.h: there is no device that can run the kernels, or a launch was
 * refused. What was put into the stream before runs. */
enum { NABLA_FAST_DEVICE_REFUSED = 64 };

/* Why the current device cannot run the kernels, in one line: no driver, one older than the library's
 * runtime, or no code for the device; null where it can. The string belongs to the library. */
NABLA_FAST_API const char* nabla_fast_cuda_why_no_device(void);

/* A cudaStream_t; null is the default stream. */
typedef void* nabla_fast_cuda_stream;

/* Of logits, or of hidden states, of whose logits a chunk exists at a time. Soft, weights are rounded to the
 * dtype of their table and take part in the division as they were rounded. */
NABLA_FAST_API nabla_fast_status nabla_fast_cuda_embedding_mix(const nabla_fast_mix_args* args,
                                                               nabla_fast_cuda_stream stream);
NABLA_FAST_API int64_t nabla_fast_cuda_embedding_mix_workspace(const nabla_fast_mix_args* args);

/* For float32 logits G waits in `grad`; for others in the workspace, for as many rows at once as 64 MiB
 * hold. Of hidden states, logits and G are computed twice, a chunk at a time; dz goes to a bf16 head as two
 * bf16 terms, or as three of float32 hidden states. */
NABLA_FAST_API nabla_fast_status nabla_fast_cuda_embedding_mix_backward(
    const nabla_fast_mix_args* args, nabla_fast_cuda_stream stream);
NABLA_FAST_API int64_t
nabla_fast_cuda_embedding_mix_backward_workspace(const nabla_fast_mix_args* args);

/* A row is read and written once, whatever the number of steps; what has no room on the chip waits in the
 * workspace meanwhile. A row that is not OK stays as it is, with token -1. Steps are
 * the device's: a negative count takes none, and `until` beyond the schedule counts as its length. The
 * workspace depends on the device that is current, which both functions ask for its limits. */
NABLA_FAST_API nabla_fast_status nabla_fast_cuda_dto_descent(const nabla_fast_descent_args* args,
                                                             nabla_fast_cuda_stream stream);
NABLA_FAST_API int64_t nabla_fast_cuda_dto_descent_workspace(const nabla_fast_descent_args* args);

/* The same on hidden states of at most 8192 columns, under a head of any dtype, which is read once a step
 * for four rows, or beyond 4096 columns for one. It comes while the device computes where its rows begin at
 * multiples of 16 bytes and have a multiple of 16 of them; else the device waits for it. Where a group may
 * have rows of two such times, all steps are taken twice. */
NABLA_FAST_API nabla_fast_status nabla_fast_cuda_dto_descent_latents(
    const nabla_fast_descent_args* args, nabla_fast_cuda_stream stream);
NABLA_FAST_API int64_t
nabla_fast_cuda_dto_descent_latents_workspace(const nabla_fast_descent_args* args);

#ifdef __cplusplus
}
#endif

#endif /* NABLA_FAST_CUDA_H_ */
