/* C interface of nabla_fast: plain pointers, 64-bit sizes and strides, status codes.
 *
 * What holds for every function:
 *
 *   memory      Functions read the caller's memory and write into the caller's memory. They
 *               allocate nothing, print nothing, throw nothing and keep no state between calls.
 *   threads     Any number of threads may call at once, as long as none writes what another uses.
 *               num_threads is how many OpenMP threads a call uses at most, 1,024 in any case; 0 or
 *               less: OpenMP's own choice. A thread needs 512 KiB of stack.
 *   refusals    Arguments that make no sense are answered by a status, and nothing but row statuses
 *               has been written: null pointers, negative sizes, sizes and strides that no address
 *               space has room for, an unknown dtype, a workspace that is too small. Where several
 *               things are wrong, the status is one of theirs. The caller sees to the rest: that
 *               the memory is there, that elements are aligned to their own size, and that what is
 *               written overlaps nothing else.
 *   no rows     A call that has no rows is fine, and its pointers may be null.
 *   workspaces  Bytes of the caller's, of any alignment and content, as many as the function's size
 *               query says for the same arguments; free for other use between calls. A size query
 *               returns 0 for what its function refuses.
 *   elements    Sizes and strides count elements, not bytes; a stride may be 0 or negative. bf16
 *               elements are the upper 16 bits of a float32, held in a uint16_t; below 2^-126
 *               they count as 0 where the CPU multiplies bf16 itself (the last two levels of
 *               nabla_fast_isa), beside an infinite one too.
 *   results     A result of a row depends on that row and the other arguments alone: it has the
 *               same bits whatever other rows are in the call and however many threads work on it.
 *               It may differ in its last bits between levels of nabla_fast_cpu_isa().
 *   values      -inf logits are masked tokens. NaN and +inf are answered by the row's status.
 */
#ifndef NABLA_FAST_H_
#define NABLA_FAST_H_

#include <stdint.h>

#if defined(_WIN32)
  #define NABLA_FAST_API
#else
  #define NABLA_FAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by every change that a caller compiled against an older header would notice. */
#define NABLA_FAST_ABI_VERSION 5

/* NABLA_FAST_ABI_VERSION of the library, to compare with the header's. */
NABLA_FAST_API int32_t nabla_fast_abi_version(void);

/* What a function returns, and what it writes for each row it was given. */
typedef int32_t nabla_fast_status;
enum {
  NABLA_FAST_OK = 0,
  /* Of a row; values stay as they are, so that callers may store them. */
  NABLA_FAST_ROW_NAN = 1,        /* the row holds a NaN */
  NABLA_FAST_ROW_INFINITE = 2,   /* the row holds +inf, and no NaN */
  NABLA_FAST_ROW_ALL_MASKED = 3, /* every logit of the row is -inf */
  /* Of a call; nothing was written. */
  NABLA_FAST_INVALID_SHAPE = 16,   /* a negative number of rows, or a vocabulary under 1 */
  NABLA_FAST_INVALID_TAU = 17,     /* tau is not in [2^-64, 2^64] */
  NABLA_FAST_INVALID_POINTER = 18, /* a null pointer where elements must be read or written */
  NABLA_FAST_UNKNOWN_DTYPE = 19,
  NABLA_FAST_UNKNOWN_ISA = 20,
  NABLA_FAST_BAD_ROWS = 21,            /* a row_status is not OK; nothing else was written */
  NABLA_FAST_INVALID_STEPS = 22,       /* a step count is negative or beyond the schedule */
  NABLA_FAST_WORKSPACE_TOO_SMALL = 23, /* smaller than the kernel's size query says */
  NABLA_FAST_INVALID_TOKEN = 24,       /* a token that the vocabulary does not have */
  NABLA_FAST_INVALID_HEADS = 25,       /* a size of an attention does not fit */
  NABLA_FAST_INVALID_PREFIX = 26,      /* a prefix is longer than its table, or not in the pool */
  NABLA_FAST_TOO_LARGE = 27            /* a size or stride that no address space has room for */
};

/* One line in English for a status; never null. The string belongs to the library. */
NABLA_FAST_API const char* nabla_fast_status_string(nabla_fast_status status);

typedef int32_t nabla_fast_dtype;
enum { NABLA_FAST_FLOAT32 = 0, NABLA_FAST_BFLOAT16 = 1 };

/* Reserved: what functions that run on a device will take beside the same arguments, a cudaStream_t
 * or its like. Functions without one run on the CPU and have returned when they return. */
typedef void* nabla_fast_stream;

/* The instruction sets that CPU kernels are compiled for. */
typedef int32_t nabla_fast_isa;
enum {
  NABLA_FAST_ISA_BASELINE = 0,
  NABLA_FAST_ISA_AVX2 = 1,
  NABLA_FAST_ISA_AVX512 = 2,
  NABLA_FAST_ISA_AVX512_BF16 = 3, /* and the dot product of pairs of bf16 */
  NABLA_FAST_ISA_AMX = 4          /* AVX-512 and the matrix unit for bf16 */
};

/* The one that kernels use: the best this CPU has, unless limited. */
NABLA_FAST_API nabla_fast_isa nabla_fast_cpu_isa(void);

/* Lets kernels of this process use `isa` at most, from the next call on: to test each level, or to
 * get the same bits on different machines. */
NABLA_FAST_API nabla_fast_status nabla_fast_limit_cpu_isa(nabla_fast_isa isa);

/* Statistics of each row of softmax(logits / tau); -inf logits are masked tokens.
 *
 *   logits       [rows, vocab] of `dtype`; row r begins at element r * row_stride (any stride)
 *   tau          temperature
 *   logsumexp    [rows]  log sum_v exp(logits[v] / tau)
 *   confidence   [rows]  max_v softmax(logits / tau)[v]
 *   entropy      [rows]  of softmax(logits / tau), in nats
 *   argmax       [rows]  index of the largest logit, the first of equal ones
 *   row_status   [rows]  NABLA_FAST_OK or NABLA_FAST_ROW_*; where it is not OK the other results of
 *                        the row are NaN, and argmax is -1
 *
 * Logits are read once. Sums are taken in fp32 over 1,024 tokens at a time and joined in double. */
NABLA_FAST_API nabla_fast_status nabla_fast_token_stats(
    const void* logits, nabla_fast_dtype dtype, int64_t rows, int64_t vocab, int64_t row_stride,
    double tau, float* logsumexp, float* confidence, float* entropy, int64_t* argmax,
    nabla_fast_status* row_status, int32_t num_threads);

/* Logits of hidden states: logits[r, v] = sum_k hidden[r, k] * head[v, k], in fp32. For few rows:
 * the head is read once whatever their number, up to the size of a cache.
 *
 *   hidden       [rows, width]; row r begins at element r * hidden_stride
 *   head         [vocab, width] of `head_dtype`; row v begins at element v * head_stride
 *   logits       [rows, vocab]; row r begins at element r * logits_stride */
NABLA_FAST_API nabla_fast_status nabla_fast_lm_logits(const float* hidden, int64_t rows,
                                                      int64_t hidden_stride, const void* head,
                                                      nabla_fast_dtype head_dtype, int64_t vocab,
                                                      int64_t width, int64_t head_stride,
                                                      float* logits, int64_t logits_stride,
                                                      int32_t num_threads);

/* Adam steps on rows of logits z under a constant one-hot gradient G, until a row's hard token
 * moves.
 *
 * A row takes steps along (1 / tau) p (G - <p, G>), p = softmax((z + g) / tau), from its step count
 * up to a limit, and stops right after the step that moves its hard token argmax(z + g), g being
 * Gumbel noise or 0. Rows of a group stop together, after as many steps as the group's earliest
 * move takes. Adam has beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, and corrects its bias.
 *
 *   z, exp_avg, exp_avg_sq   [rows, vocab], changed in place; row r begins at element r * its
 *                            stride; rows do not overlap. -inf logits are masked tokens and stay
 *   grad                     [rows, vocab] G; any stride
 *   step                     [rows] steps taken, brought up to date
 *   schedule                 learning rates of steps 0 to iters - 1; row r's begin at element
 *                            r * schedule_stride, 0 for one schedule
 *   until                    [rows] at which step each row stops, at most iters; null for iters
 *   group                    [rows] the group of each row; null: every row stops by itself
 *   tau                      temperature
 *   noise_seed, noise_position  [rows] keys of the noise as nabla_fast.ops.gumbel_noise defines it:
 *                            token v has word v mod 4 of Philox-4x32-10 at counter (v div 4,
 *                            position low word, position high word, 0) under the key (seed low
 *                            word, seed high word), u = (word div 2^9 + 1/2) / 2^23,
 *                            g = -log(-log u) rounded to fp32; both null: no noise
 *   token                    [rows] the hard token now, the first of equal ones
 *   flipped                  [rows] 1 where the last step taken moved it, else 0
 *   row_status               [rows] NABLA_FAST_OK or NABLA_FAST_ROW_*, of z. Unless all are OK,
 *                            nothing else is written and NABLA_FAST_BAD_ROWS is returned
 *   workspace                as many bytes as nabla_fast_dto_descent_workspace() says
 *
 * A row becomes NaN where G or the learning rate makes it so. */
NABLA_FAST_API nabla_fast_status nabla_fast_dto_descent(
    float* z, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t* step, int64_t rows,
    int64_t vocab, int64_t z_stride, int64_t grad_stride, int64_t exp_avg_stride,
    int64_t exp_avg_sq_stride, const double* schedule, int64_t iters, int64_t schedule_stride,
    const int64_t* until, const int64_t* group, double tau, const int64_t* noise_seed,
    const int64_t* noise_position, int64_t* token, uint8_t* flipped, nabla_fast_status* row_status,
    void* workspace, int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_dto_descent(); noise and groups: whether there are any. */
NABLA_FAST_API int64_t nabla_fast_dto_descent_workspace(int64_t rows, int64_t vocab, int64_t iters,
                                                        int32_t noise, int32_t groups,
                                                        int32_t num_threads);

/* The same on hidden states h, with z = h head^T: steps go along head^T times the gradient of z.
 *
 *   h, exp_avg, exp_avg_sq   [rows, width], changed in place; row r begins at element r * its
 *                            stride; rows do not overlap
 *   head                     [vocab, width] of `head_dtype`, a constant; row v begins at element
 *                            v * head_stride
 *   grad                     [rows, vocab] G; any stride
 *   workspace                as many bytes as nabla_fast_dto_descent_latents_workspace() says
 *
 * The others are as of nabla_fast_dto_descent(); row_status is of z.
 *
 * K steps are K + 1 passes over the head, each shared by 32 rows. Logits exist 64 tokens at a time;
 * sums over them are taken in fp32 within one of at most 32 segments of the vocabulary, and joined
 * in double. */
NABLA_FAST_API nabla_fast_status nabla_fast_dto_descent_latents(
    float* h, const void* head, nabla_fast_dtype head_dtype, const float* grad, float* exp_avg,
    float* exp_avg_sq, int64_t* step, int64_t rows, int64_t vocab, int64_t width, int64_t h_stride,
    int64_t head_stride, int64_t grad_stride, int64_t exp_avg_stride, int64_t exp_avg_sq_stride,
    const double* schedule, int64_t iters, int64_t schedule_stride, const int64_t* until,
    const int64_t* group, double tau, const int64_t* noise_seed, const int64_t* noise_position,
    int64_t* token, uint8_t* flipped, nabla_fast_status* row_status, void* workspace,
    int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_dto_descent_latents(). */
NABLA_FAST_API int64_t nabla_fast_dto_descent_latents_workspace(int64_t rows, int64_t vocab,
                                                                int64_t width);

/* Gradient of a linear cross-entropy with respect to its hidden states:
 * grad[r] = sum_v (softmax(hidden[r] . head)[v] - [v = targets[r]]) * head[v]; of the logits, 64 x
 * 64 exist at a time.
 *
 *   hidden       [rows, width] fp32; row r begins at element r * hidden_stride
 *   head         [vocab, width] of `head_dtype`; row v begins at element v * head_stride
 *   targets      [rows] tokens
 *   grad         [rows, width]; row r begins at element r * grad_stride
 *   row_status   [rows]  NABLA_FAST_OK or NABLA_FAST_ROW_*; where it is not OK the row is NaN
 *   workspace    as many bytes as nabla_fast_nll_grad_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_nll_grad(
    const float* hidden, int64_t rows, int64_t hidden_stride, const void* head,
    nabla_fast_dtype head_dtype, int64_t vocab, int64_t width, int64_t head_stride,
    const int64_t* targets, float* grad, int64_t grad_stride, nabla_fast_status* row_status,
    void* workspace, int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_nll_grad(). */
NABLA_FAST_API int64_t nabla_fast_nll_grad_workspace(int64_t rows, int64_t vocab, int64_t width);

/* A matrix [.., width] whose rows lie `stride` elements apart and have unit stride themselves. */
typedef struct {
  const void* data;
  nabla_fast_dtype dtype;
  int64_t width, stride;
} nabla_fast_table;

/* Relaxed one-hot rows y over a vocabulary, and what they mix: with z the logits, g Gumbel noise or 0
 * and t a table,
 *
 *   mixes[t][r] = sum_v y[r, v] tables[t][v],
 *   y[r] = softmax((z[r] + g[r]) / tau), or the one-hot of the first largest z[r] + g[r].
 *
 * Logits are given, or are products of hidden states with a head. */
typedef struct {
  int64_t rows, vocab;
  nabla_fast_table logits;       /* [rows, vocab]; data is null where hidden and head are given */
  nabla_fast_table hidden, head; /* [rows, width] and [vocab, width] */
  double tau;
  const int64_t* noise_seed;     /* [rows], as of nabla_fast_dto_descent(); null: no noise */
  const int64_t* noise_position; /* [rows] */
  int64_t table_count;
  const nabla_fast_table* tables; /* [table_count] of [vocab, width] */
} nabla_fast_mix;

/* Mixes of each table; tables and head are read once for 64 rows, of the logits of a head 64 x 64
 * exist at a time.
 *
 *   hard         0 for the softmax, else the one-hot
 *   mixes        [table_count] of [rows, width of the table], rows side by side
 *   row_status   [rows]  NABLA_FAST_OK or NABLA_FAST_ROW_*, of the logits; where it is not OK the
 *                        row's mixes are NaN
 *   workspace    as many bytes as nabla_fast_embedding_mix_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_embedding_mix(const nabla_fast_mix* inputs,
                                                          int32_t hard, float* const* mixes,
                                                          nabla_fast_status* row_status,
                                                          void* workspace, int64_t workspace_bytes,
                                                          int32_t num_threads);

/* Bytes of workspace for nabla_fast_embedding_mix(). */
NABLA_FAST_API int64_t nabla_fast_embedding_mix_workspace(const nabla_fast_mix* inputs,
                                                          int32_t hard, int32_t num_threads);

/* Gradient of what the mixes lead to, with the softmax's Jacobian: with p = softmax((z + g) / tau),
 * G[r, v] = sum_t <tables[t][v], cotangents[t][r]> + direct[r, v],
 *
 *   dz[r, v] = (1 / tau) p[r, v] (G[r, v] - <p[r], G[r]>),  0 where p is.
 *
 *   cotangents   [table_count] of [rows, width of the table]
 *   direct       [rows, vocab]; null, or data null: none
 *   grad         [rows, vocab] dz in the dtype of the logits; where hidden states are given, dz head,
 *                [rows, width of the head] float32. Row r begins at element r * grad_stride. For
 *                float32 logits G waits there: nothing else of [rows, vocab] exists
 *   row_status   as above
 *   workspace    as many bytes as nabla_fast_embedding_mix_backward_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_embedding_mix_backward(
    const nabla_fast_mix* inputs, const nabla_fast_table* cotangents,
    const nabla_fast_table* direct, void* grad, int64_t grad_stride, nabla_fast_status* row_status,
    void* workspace, int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_embedding_mix_backward(). */
NABLA_FAST_API int64_t nabla_fast_embedding_mix_backward_workspace(
    const nabla_fast_mix* inputs, const nabla_fast_table* cotangents, int32_t num_threads);

/* Statistics, as nabla_fast_token_stats() gives them, of softmax(hidden . head / tau); of the
 * logits, 64 x 64 exist at a time.
 *
 *   hidden       [rows, width]
 *   head         [vocab, width]
 *   workspace    as many bytes as nabla_fast_linear_token_stats_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_linear_token_stats(
    const nabla_fast_table* hidden, int64_t rows, const nabla_fast_table* head, int64_t vocab,
    double tau, float* logsumexp, float* confidence, float* entropy, int64_t* argmax,
    nabla_fast_status* row_status, void* workspace, int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_linear_token_stats(). */
NABLA_FAST_API int64_t nabla_fast_linear_token_stats_workspace(const nabla_fast_table* hidden,
                                                               int64_t rows,
                                                               const nabla_fast_table* head,
                                                               int64_t vocab);

/* Small tensors that stand for rows of the gradient with respect to one-hot tokens:
 * G[r, v] = sum_t <tables[t][v], cotangents[t][r]>
 *           - nll_coeff * log_softmax(hidden[r] . head)[v],  0 where the token is masked. */
typedef struct {
  int64_t rows, vocab;
  int64_t table_count;
  const nabla_fast_table* cotangents; /* [table_count] of [rows, width of the table] */
  const nabla_fast_table* tables;     /* [table_count] of [vocab, width] */
  nabla_fast_table hidden;            /* [rows, width of the head] */
  nabla_fast_table head;              /* [vocab, width] */
  double nll_coeff;
  /* Null, or [table_count] of null or [vocab]: the row of tables[t] that stands for each token,
   * 0 <= row < table_rows[t], else NABLA_FAST_INVALID_TOKEN. The table is then
   * [table_rows[t], width], the model's own, of which no copy is made in the vocabulary's order. */
  const int64_t* const* token_maps;
  const int64_t* table_rows; /* [table_count], read where there is a map */
} nabla_fast_onehot;

/* Rows of G. Head and tables are read once for 256 rows.
 *
 *   grad         [rows, vocab]; row r begins at element r * grad_stride
 *   row_status   [rows]  NABLA_FAST_OK or NABLA_FAST_ROW_*, of the logits hidden[r] . head; where it
 *                        is not OK the row is NaN
 *   workspace    as many bytes as nabla_fast_onehot_grad_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_onehot_grad(const nabla_fast_onehot* inputs,
                                                        float* grad, int64_t grad_stride,
                                                        nabla_fast_status* row_status,
                                                        void* workspace, int64_t workspace_bytes,
                                                        int32_t num_threads);

/* Bytes of workspace for nabla_fast_onehot_grad(). */
NABLA_FAST_API int64_t nabla_fast_onehot_grad_workspace(const nabla_fast_onehot* inputs);

/* Euclidean norms of the rows of G, in one pass over head and tables; of G, 64 x 64 exist at a
 * time.
 *
 *   norm         [rows]
 *   row_status   as above
 *   workspace    as many bytes as nabla_fast_onehot_grad_norm_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_onehot_grad_norm(
    const nabla_fast_onehot* inputs, float* norm, nabla_fast_status* row_status, void* workspace,
    int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_onehot_grad_norm(). */
NABLA_FAST_API int64_t nabla_fast_onehot_grad_norm_workspace(const nabla_fast_onehot* inputs);

/* Strides of [batch, heads, tokens, dim], dim being contiguous. */
typedef struct {
  int64_t batch, head, token;
} nabla_fast_strides;

/* Strides of [blocks, block_size, heads, dim], dim being contiguous. */
typedef struct {
  int64_t block, token, head;
} nabla_fast_pool_strides;

/* The widest head that attention takes. */
#define NABLA_FAST_MOST_HEAD_DIM 512

/* Queries, keys and values of suffixes behind frozen prefixes in a block pool, all fp32.
 *
 * Suffix token s of sequence b is at position prefix_lengths[b] + s and sees every position up to
 * its own, or the last `window` of these. Query head h goes with key-value head h / (heads /
 * kv_heads). */
typedef struct {
  int64_t batch, heads, kv_heads, suffix, dim; /* heads: a multiple of kv_heads */
  int64_t blocks, block_size;                  /* of the pool */
  int64_t table_width;                         /* blocks a table has room for */
  int64_t window;                              /* 0: none */
  double scale;                                /* of the scores */
  const float* q;                              /* [batch, heads, suffix, dim] */
  const float* k;                              /* [batch, kv_heads, suffix, dim] */
  const float* v;                              /* likewise */
  const float* key_pool;                       /* [blocks, block_size, kv_heads, dim] */
  const float* value_pool;                     /* likewise */
  const int64_t* block_tables;   /* [batch, table_width]; what lies behind a prefix is not read */
  const int64_t* prefix_lengths; /* [batch] */
  int64_t table_stride;
  nabla_fast_strides q_strides, k_strides, v_strides;
  nabla_fast_pool_strides key_pool_strides, value_pool_strides;
} nabla_fast_attention;

/* output [batch, heads, suffix, dim] = softmax(scale q [K_prefix k]^T) [V_prefix v], causal.
 *
 * A NaN or an infinity among the values makes NaN of any query of its sequence that has it in its
 * tile, seen or not. Threads are woken for work of some 50 microseconds each. */
NABLA_FAST_API nabla_fast_status nabla_fast_prefix_attention(const nabla_fast_attention* inputs,
                                                             float* output,
                                                             nabla_fast_strides output_strides,
                                                             int32_t num_threads);

/* Gradients of what the suffix gives to nabla_fast_prefix_attention; the prefix is constant.
 *
 *   cotangent    [batch, heads, suffix, dim] gradient of the output
 *   dq           [batch, heads, suffix, dim]
 *   dk, dv       [batch, kv_heads, suffix, dim]
 *   workspace    as many bytes as nabla_fast_prefix_attention_backward_workspace() says */
NABLA_FAST_API nabla_fast_status nabla_fast_prefix_attention_backward(
    const nabla_fast_attention* inputs, const float* cotangent,
    nabla_fast_strides cotangent_strides, float* dq, nabla_fast_strides dq_strides, float* dk,
    nabla_fast_strides dk_strides, float* dv, nabla_fast_strides dv_strides, void* workspace,
    int64_t workspace_bytes, int32_t num_threads);

/* Bytes of workspace for nabla_fast_prefix_attention_backward(). */
NABLA_FAST_API int64_t nabla_fast_prefix_attention_backward_workspace(
    const nabla_fast_attention* inputs, int32_t num_threads);

#ifdef __cplusplus
}
#endif

#endif /* NABLA_FAST_H_ */
