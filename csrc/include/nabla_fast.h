/* C interface of nabla_fast: plain pointers, 64-bit sizes and strides, status codes.
 *
 * What holds for every function:
 *
 *   structs     A call is a struct, whose first field is its size: sizeof of it as the caller
 *               compiled it. Later versions may add fields behind the last one, up to 4,096 bytes in
 *               all; what a caller does not know counts as 0, and a field that the library does not
 *               know has to be 0. Fields that a call does not use are not read: begin with a struct
 *               of zeros. The struct is copied before anything is written.
 *   memory      Functions read the caller's memory and write into the caller's memory. They
 *               allocate nothing, print nothing, throw nothing and keep no state between calls.
 *   threads     Any number of threads may call at once, as long as none writes what another uses.
 *               num_threads is how many OpenMP threads a call uses at most, 1,024 in any case; 0 or
 *               less: OpenMP's own choice. A thread needs 512 KiB of stack.
 *   refusals    Arguments that make no sense are answered by a status, and nothing but row statuses
 *               has been written: a struct of another size, null pointers, negative sizes, sizes
 *               and strides that no address space has room for, a dtype that an argument cannot
 *               have, a workspace that is too small, and what is written overlapping itself or
 *               anything else that the call uses. Where several things are wrong, the status is one
 *               of theirs. The caller sees to the rest: that the memory is there, and that elements
 *               are aligned to their own size.
 *   no rows     A call that has no rows is fine, and its pointers may be null.
 *   workspaces  Bytes of the caller's, of any alignment and content, as many as the function's size
 *               query says for the same struct; free for other use between calls. A size query does
 *               not read the fields of the workspace and of what is written, so that these may
 *               follow. It returns 0 where there are no rows or the function refuses the rest.
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

/* Raised by every change that a caller compiled against an older header would notice: not by a field
 * at the end of a struct, nor by a function more. */
#define NABLA_FAST_ABI_VERSION 6

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
  NABLA_FAST_INVALID_SHAPE = 16,   /* a negative size, an empty vocabulary, or widths that differ */
  NABLA_FAST_INVALID_TAU = 17,     /* tau is not in [2^-64, 2^64] */
  NABLA_FAST_INVALID_POINTER = 18, /* a null pointer where elements must be read or written */
  NABLA_FAST_UNKNOWN_DTYPE = 19,   /* or one that the argument cannot have */
  NABLA_FAST_UNKNOWN_ISA = 20,
  NABLA_FAST_BAD_ROWS = 21,            /* a row_status is not OK; nothing else was written */
  NABLA_FAST_INVALID_STEPS = 22,       /* a step count is negative or beyond the schedule */
  NABLA_FAST_WORKSPACE_TOO_SMALL = 23, /* smaller than the kernel's size query says */
  NABLA_FAST_INVALID_TOKEN = 24,       /* a token that the vocabulary does not have */
  NABLA_FAST_INVALID_HEADS = 25,       /* a size of an attention does not fit */
  NABLA_FAST_INVALID_PREFIX = 26,      /* a prefix is longer than its table, or not in the pool */
  NABLA_FAST_TOO_LARGE = 27,           /* a size or stride that no address space has room for */
  NABLA_FAST_INVALID_SIZE = 28,        /* the struct's size, or a field behind what is known here */
  NABLA_FAST_OVERLAP = 29,             /* an output overlaps itself or another argument */
  NABLA_FAST_INVALID_SOFTCAP = 30,     /* softcap is neither 0 nor in [2^-64, 2^64] */
  NABLA_FAST_INVALID_FILTER = 31,      /* top_k is negative, or top_p not in (0, 1] */
  NABLA_FAST_INVALID_SCALE = 32        /* a scale of logits is not finite */
};

/* One line in English for a status; never null. The string belongs to the library. */
NABLA_FAST_API const char* nabla_fast_status_string(nabla_fast_status status);

typedef int32_t nabla_fast_dtype;
enum { NABLA_FAST_FLOAT32 = 0, NABLA_FAST_BFLOAT16 = 1 };

/* A matrix [.., width] whose rows lie `stride` elements apart and have unit stride themselves. How
 * many rows it has, its place says. */
typedef struct {
  const void* data;
  int64_t width, stride;
  nabla_fast_dtype dtype;
} nabla_fast_matrix;

/* A matrix that is written. */
typedef struct {
  void* data;
  int64_t width, stride;
  nabla_fast_dtype dtype;
} nabla_fast_output;

/* What a model does to the products u[v] = hidden . head[v] before its softmax: its logits are
 * c tanh(s (u[v] + b[v]) / c). All zero: u itself. */
typedef struct {
  const float* bias; /* [vocab] b; null: none */
  double scale;      /* s; 0 counts as 1 */
  double softcap;    /* c, in [2^-64, 2^64]; 0: none */
} nabla_fast_head_map;

/* The instruction sets that CPU kernels are compiled for. Functions that run on a device will take
 * the same structs, and a stream. */
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

/* -- statistics --------------------------------------------------------------------------------- */

/* Statistics of each row of softmax(logits / tau); -inf logits are masked tokens. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_stats_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix logits;      /* [rows, vocab], of nabla_fast_token_stats() */
  nabla_fast_matrix hidden;      /* [rows, width], of nabla_fast_linear_token_stats() like */
  nabla_fast_matrix head;        /* [vocab, width], logits being hidden . head */
  double tau;                    /* temperature */
  float* logsumexp;              /* [rows] log sum_v exp(logits[v] / tau) */
  float* confidence;             /* [rows] max_v softmax(logits / tau)[v] */
  float* entropy;                /* [rows] of softmax(logits / tau), in nats */
  int64_t* argmax;               /* [rows] of the largest logit, the first of equal ones */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*; where it is not OK the other results of the
                                    row are NaN, and argmax is -1 */
  nabla_fast_head_map head_map;  /* of nabla_fast_linear_token_stats() */
} nabla_fast_stats_args;

/* Of logits, which are read once. Sums are taken in fp32 over 1,024 tokens at a time and joined in
 * double. No workspace. */
NABLA_FAST_API nabla_fast_status nabla_fast_token_stats(const nabla_fast_stats_args* args);

/* Of hidden states; of the logits, 64 x 64 exist at a time. */
NABLA_FAST_API nabla_fast_status nabla_fast_linear_token_stats(const nabla_fast_stats_args* args);
NABLA_FAST_API int64_t nabla_fast_linear_token_stats_workspace(const nabla_fast_stats_args* args);

/* -- draws -------------------------------------------------------------------------------------- */

/* One token a row from softmax(top_p(top_k(logits / tau))): the first with the largest log p + g, g
 * Gumbel noise.
 *
 * Top-k keeps what ties with the k-th; top-p drops the least likely of what is left as long as their
 * mass, rounded to float32, is at most 1 - top_p, of equally likely ones those of lower index first,
 * and never the last.
 *
 * Token v has word v mod 4 of Philox-4x32-10 at counter (v div 4, position, start, 4 visit + domain),
 * of each the low word, under the key (seed low word, seed high word); the domain is 1, or 2 of
 * redraws. g = -log(-log((word + 1/2) / 2^32)). All of this is in double precision. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_draw_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix logits; /* [rows, vocab] */
  const int64_t* seed;      /* [rows], as the three that follow */
  const int64_t* start;
  const int64_t* visit;
  const int64_t* position;
  int32_t redraw; /* 0 for domain 1, else 2 */
  double tau;     /* temperature */
  int64_t top_k;  /* 0: all */
  double top_p;
  int64_t* token;                /* [rows] */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*; where it is not OK the token is 0 */
} nabla_fast_draw_args;

/* Logits are read once. With filters the workspace has room for a row's tokens a thread. */
NABLA_FAST_API nabla_fast_status nabla_fast_draw_tokens(const nabla_fast_draw_args* args);
NABLA_FAST_API int64_t nabla_fast_draw_tokens_workspace(const nabla_fast_draw_args* args);

/* -- products with a head ----------------------------------------------------------------------- */

/* Logits of hidden states: logits[r, v] = sum_k hidden[r, k] * head[v, k]. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_lm_logits_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix hidden; /* [rows, width] float32 */
  nabla_fast_matrix head;   /* [vocab, width] */
  nabla_fast_output logits; /* [rows, vocab] float32 */
  nabla_fast_head_map head_map;
} nabla_fast_lm_logits_args;

/* For few rows: the head is read once whatever their number, up to the size of a cache. No
 * workspace. */
NABLA_FAST_API nabla_fast_status nabla_fast_lm_logits(const nabla_fast_lm_logits_args* args);

/* Gradient of a linear cross-entropy with respect to its hidden states:
 * grad[r] = sum_v (softmax(z[r])[v] - [v = targets[r]]) * dz[r, v]/du[r, v] * head[v]
 * of logits z of u = hidden . head. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_nll_grad_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix hidden;      /* [rows, width] float32 */
  nabla_fast_matrix head;        /* [vocab, width] */
  const int64_t* targets;        /* [rows] tokens */
  nabla_fast_output grad;        /* [rows, width] float32 */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*; where it is not OK the row is NaN */
  nabla_fast_head_map head_map;
} nabla_fast_nll_grad_args;

/* Of the logits, 64 x 64 exist at a time. */
NABLA_FAST_API nabla_fast_status nabla_fast_nll_grad(const nabla_fast_nll_grad_args* args);
NABLA_FAST_API int64_t nabla_fast_nll_grad_workspace(const nabla_fast_nll_grad_args* args);

/* -- descents ----------------------------------------------------------------------------------- */

/* Adam steps on rows of logits z under a constant one-hot gradient G, until a row's hard token
 * moves.
 *
 * A row takes steps along (1 / tau) p (G - <p, G>), p = softmax((z + g) / tau), from its step count
 * up to a limit, and stops right after the step that moves its hard token argmax(z + g), g being
 * Gumbel noise or 0. Rows of a group stop together, after as many steps as the group's earliest
 * move takes. Adam has beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, and corrects its bias.
 *
 * The noise is as nabla_fast.ops.gumbel_noise defines it: token v has word v mod 4 of Philox-4x32-10
 * at counter (v div 4, position low word, position high word, 0) under the key (seed low word, seed
 * high word), u = (word div 2^9 + 1/2) / 2^23, g = -log(-log u) rounded to fp32. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_descent_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  /* float32, changed in place: z [rows, vocab], or of nabla_fast_dto_descent_latents() hidden states
   * h [rows, width]; and Adam's moments of it. -inf logits are masked tokens and stay. */
  nabla_fast_output parameter, exp_avg, exp_avg_sq;
  int64_t* step;          /* [rows] steps taken, brought up to date */
  nabla_fast_matrix head; /* [vocab, width], of nabla_fast_dto_descent_latents(), a constant */
  nabla_fast_matrix grad; /* [rows, vocab] float32 G */
  const double* schedule; /* learning rates of steps 0 to iters - 1; row r's begin at element
                                r * schedule_stride, 0 for one schedule */
  int64_t iters, schedule_stride;
  const int64_t* until;          /* [rows] step at which each row stops, <= iters; null: iters */
  const int64_t* group;          /* [rows] the group of each row; null: every row by itself */
  double tau;                    /* temperature */
  const int64_t* noise_seed;     /* [rows] keys of the noise; both null: no noise */
  const int64_t* noise_position; /* [rows] */
  int64_t* token;                /* [rows] the hard token now, the first of equal ones */
  uint8_t* flipped;              /* [rows] 1 where the last step taken moved it, else 0 */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*, of z. Unless all are OK, nothing else is
                                    written and NABLA_FAST_BAD_ROWS is returned */
  nabla_fast_head_map head_map;  /* of nabla_fast_dto_descent_latents(); CUDA functions refuse it */
} nabla_fast_descent_args;

/* A row becomes NaN where G or the learning rate makes it so. */
NABLA_FAST_API nabla_fast_status nabla_fast_dto_descent(const nabla_fast_descent_args* args);
NABLA_FAST_API int64_t nabla_fast_dto_descent_workspace(const nabla_fast_descent_args* args);

/* The same on hidden states h, with z = h head^T: steps go along head^T times the gradient of z.
 *
 * K steps are K + 1 passes over the head, each shared by 32 rows. Logits exist 64 tokens at a time;
 * sums over them are taken in fp32 within one of at most 32 segments of the vocabulary, and joined
 * in double. */
NABLA_FAST_API nabla_fast_status
nabla_fast_dto_descent_latents(const nabla_fast_descent_args* args);
NABLA_FAST_API int64_t
nabla_fast_dto_descent_latents_workspace(const nabla_fast_descent_args* args);

/* -- embedding mixes ---------------------------------------------------------------------------- */

/* Relaxed one-hot rows y over a vocabulary, and what they mix: with z the logits, g Gumbel noise or 0
 * and t a table,
 *
 *   mixes[t][r] = sum_v y[r, v] tables[t][v],
 *   y[r] = softmax((z[r] + g[r]) / tau), or the one-hot of the first largest z[r] + g[r].
 *
 * Logits are given, or are products of hidden states with a head. The backward has the softmax's
 * Jacobian: with p = softmax((z + g) / tau),
 * G[r, v] = sum_t <tables[t][v], cotangents[t][r]> + direct[r, v],
 *
 *   dz[r, v] = (1 / tau) p[r, v] (G[r, v] - <p[r], G[r]>),  0 where p is.
 *
 * One struct serves both: each reads what it needs. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_mix_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix logits; /* [rows, vocab]; data is null where hidden and head are given */
  nabla_fast_matrix hidden; /* [rows, width] */
  nabla_fast_matrix head;   /* [vocab, width] */
  double tau;
  const int64_t* noise_seed;     /* [rows], as of nabla_fast_descent_args; null: no noise */
  const int64_t* noise_position; /* [rows] */
  int64_t table_count;
  const nabla_fast_matrix* tables; /* [table_count] of [vocab, width of the table] */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*, of the logits; where it is not OK the row's
                                      results are NaN */
  /* Of the forward. */
  int32_t hard;                   /* 0 for the softmax, else the one-hot */
  const nabla_fast_output* mixes; /* [table_count] of [rows, width of the table] float32 */
  /* Of the backward. */
  const nabla_fast_matrix* cotangents; /* [table_count] of [rows, width of the table] */
  nabla_fast_matrix direct;            /* [rows, vocab]; data null: none */
  nabla_fast_output grad;              /* [rows, vocab] dz in the dtype of the logits; where hidden
                                          states are given, dz head [rows, width] float32 */
  /* Null, or y = z + g where hidden states are given, which the forward writes and the backward of the
   * same call reads instead of multiplying anew: of every 64 rows [vocab, their number rounded up to
   * 16] floats. CUDA functions leave it alone. */
  float* perturbed;
} nabla_fast_mix_args;

/* Tables and head are read once for 64 rows; of the logits of a head 64 x 64 exist at a time. */
NABLA_FAST_API nabla_fast_status nabla_fast_embedding_mix(const nabla_fast_mix_args* args);
NABLA_FAST_API int64_t nabla_fast_embedding_mix_workspace(const nabla_fast_mix_args* args);

/* For float32 logits G waits in `grad`: nothing else of [rows, vocab] exists. */
NABLA_FAST_API nabla_fast_status nabla_fast_embedding_mix_backward(const nabla_fast_mix_args* args);
NABLA_FAST_API int64_t nabla_fast_embedding_mix_backward_workspace(const nabla_fast_mix_args* args);

/* -- one-hot gradients -------------------------------------------------------------------------- */

/* Rows of the gradient with respect to one-hot tokens, from small tensors:
 * G[r, v] = sum_t <tables[t][v], cotangents[t][r]>
 *           - nll_coeff * log_softmax(hidden[r] . head)[v],  0 where the token is masked. */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_onehot_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t rows, vocab;
  nabla_fast_matrix hidden; /* [rows, width] */
  nabla_fast_matrix head;   /* [vocab, width] */
  double nll_coeff;
  int64_t table_count;
  const nabla_fast_matrix* cotangents; /* [table_count] of [rows, width of the table] */
  const nabla_fast_matrix* tables;     /* [table_count] of [vocab, width of the table] */
  /* Null, or [table_count] of null or [vocab]: the row of tables[t] that stands for each token,
   * 0 <= row < table_rows[t], else NABLA_FAST_INVALID_TOKEN. The table is then
   * [table_rows[t], width], the model's own, of which no copy is made in the vocabulary's order. */
  const int64_t* const* token_maps;
  const int64_t* table_rows;     /* [table_count], read where there is a map */
  nabla_fast_status* row_status; /* [rows] OK or ROW_*, of the logits hidden[r] . head; where it is
                                    not OK the row's result is NaN */
  nabla_fast_output grad;        /* [rows, vocab] float32 G, of nabla_fast_onehot_grad() */
  float* norm;                   /* [rows] ||G[r]||, of nabla_fast_onehot_grad_norm() */
  nabla_fast_head_map head_map;
} nabla_fast_onehot_args;

/* Rows of G. Head and tables are read once for 256 rows. */
NABLA_FAST_API nabla_fast_status nabla_fast_onehot_grad(const nabla_fast_onehot_args* args);
NABLA_FAST_API int64_t nabla_fast_onehot_grad_workspace(const nabla_fast_onehot_args* args);

/* Euclidean norms of the rows of G, in one pass over head and tables; of G, 64 x 64 exist at a
 * time. */
NABLA_FAST_API nabla_fast_status nabla_fast_onehot_grad_norm(const nabla_fast_onehot_args* args);
NABLA_FAST_API int64_t nabla_fast_onehot_grad_norm_workspace(const nabla_fast_onehot_args* args);

/* -- attention ---------------------------------------------------------------------------------- */

/* Tensor [batch, heads, tokens, dim] of float32, dim being contiguous. */
typedef struct {
  const float* data;
  int64_t batch_stride, head_stride, token_stride;
} nabla_fast_heads;

/* One that is written. */
typedef struct {
  float* data;
  int64_t batch_stride, head_stride, token_stride;
} nabla_fast_heads_output;

/* Pool [blocks, block_size, kv_heads, dim] of float32, dim being contiguous. */
typedef struct {
  const float* data;
  int64_t block_stride, token_stride, head_stride;
} nabla_fast_pool;

/* The widest head that attention takes. */
#define NABLA_FAST_MOST_HEAD_DIM 512

/* Queries, keys and values of suffixes after frozen prefixes in a block pool.
 *
 * Suffix token s of sequence b is at position prefix_lengths[b] + s and sees every position up to
 * its own, or the last `window` of these. Query head h goes with key-value head h / (heads /
 * kv_heads). */
typedef struct {
  int64_t size; /* sizeof(nabla_fast_attention_args) */
  void* workspace;
  int64_t workspace_bytes;
  int32_t num_threads;
  int64_t batch, heads, kv_heads, suffix, dim; /* heads: a multiple of kv_heads */
  int64_t blocks, block_size;                  /* of the pools */
  int64_t table_width;                         /* blocks a table has room for */
  int64_t window;                              /* 0: none */
  double scale;                                /* of the scores */
  nabla_fast_heads q;                          /* [batch, heads, suffix, dim] */
  nabla_fast_heads k, v;                       /* [batch, kv_heads, suffix, dim] */
  nabla_fast_pool key_pool, value_pool;
  const int64_t* block_tables; /* [batch, table_width]; what lies after a prefix is not read */
  int64_t table_stride;
  const int64_t* prefix_lengths; /* [batch] */
  /* Of the forward. */
  nabla_fast_heads_output output; /* [batch, heads, suffix, dim] */
  /* Of the backward. */
  nabla_fast_heads cotangent;     /* [batch, heads, suffix, dim] gradient of the output */
  nabla_fast_heads_output dq;     /* [batch, heads, suffix, dim] */
  nabla_fast_heads_output dk, dv; /* [batch, kv_heads, suffix, dim] */
  /* Of the forward. */
  float* logsumexp; /* [batch, heads, suffix] log sum exp of the scores a query sees; null: none */
  /* Of both. */
  double softcap; /* c: a score s, scaled, becomes c tanh(s / c); 0: none */
  const float*
      sinks; /* [heads] score of a token without a value that all queries of a head see, which
                         is not capped; null: none */
} nabla_fast_attention_args;

/* output = softmax(scale q [K_prefix k]^T) [V_prefix v], causal, with capped scores and the sink among
 * what the softmax is over where these are given. No workspace.
 *
 * A NaN or an infinity among the values makes NaN of any query of its sequence that has it in its
 * tile, seen or not. Threads are woken for work of some 25 microseconds each. */
NABLA_FAST_API nabla_fast_status nabla_fast_prefix_attention(const nabla_fast_attention_args* args);

/* Gradients of what the suffix gives to nabla_fast_prefix_attention; the prefix is constant. */
NABLA_FAST_API nabla_fast_status
nabla_fast_prefix_attention_backward(const nabla_fast_attention_args* args);
NABLA_FAST_API int64_t
nabla_fast_prefix_attention_backward_workspace(const nabla_fast_attention_args* args);

#ifdef __cplusplus
}
#endif

#endif /* NABLA_FAST_H_ */
