// Kernels for CPUs, reached through a C ABI without torch's headers, so that one build serves any version of torch.
//
// Vectors are GCC's, which any architecture has; the compiler splits them where registers are narrower.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

struct bfloat16 {
    uint16_t bits;
};

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t IntVector __attribute__((vector_size(32)));
typedef uint32_t BitVector __attribute__((vector_size(32)));
typedef uint16_t HalfVector __attribute__((vector_size(16)));

constexpr int LANES = 8;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f;

#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE Vector load(const bfloat16* from) {
    HalfVector half;
    std::memcpy(&half, from, sizeof half);
    return (Vector)(__builtin_convertvector(half, BitVector) << 16);
}

INLINE void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

INLINE Vector broadcast(float value) { return Vector{} + value; }

// 2^x with a relative error of 2e-7, for x <= 0; 0 below 2^-125; NaN stays NaN.
INLINE Vector exp2_of_negative(Vector x) {
    const Vector shift = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector least = broadcast(-125.f);
    Vector clamped = x < least ? least : x;
    Vector shifted = clamped + shift;
    Vector rest = clamped - (shifted - shift);
    Vector power = broadcast(1.535336188319500e-4f);
    power = power * rest + broadcast(1.339887440266574e-3f);
    power = power * rest + broadcast(9.618437357674640e-3f);
    power = power * rest + broadcast(5.550332471162809e-2f);
    power = power * rest + broadcast(2.402264791363012e-1f);
    power = power * rest + broadcast(6.931472028550421e-1f);
    power = power * rest + broadcast(1.f);
    BitVector exponent = ((BitVector)shifted - 0x4B400000u + 127u) << 23;
    Vector result = power * (Vector)exponent;
    return x < least ? Vector{} : result;
}

// ---- attention
//
// Flash attention (Dao et al., 2022): keys are visited KEYS at a time, with a running maximum and sum for each row.
// A row is one query head of one token. The G query heads of a KV head read the same keys, so the rows of a request
// under a KV head are its tokens times G, and a task has at most ROWS of them.
//
// Of each KV head a block of S tokens holds the keys as [H, S], so that GROUP scores are computed at once without a sum
// across a vector, and the values as [S, H].

constexpr int GROUP = 16;  // tokens whose scores are computed at once
constexpr int GROUPS = 8;
constexpr int KEYS = GROUP * GROUPS;
constexpr int ROWS = 48;
constexpr int TILE = 6;  // rows that are in registers at once

struct Cache {
    const void* keys;
    const void* values;
    const int32_t* block_tables;  // [R, table_stride]
    int64_t table_stride;
    int num_kv_heads, head_size, block_size;
};

struct Task {
    int request, head, first_row, num_rows;
    int64_t cost;
};

// scores[r][t] = sum over d of q[r][d] * k[d][t], for R rows and GROUP tokens.
template <int R, class T>
INLINE void score(const float* q, int head_size, const T* k, int64_t k_stride, float* scores, const T* next_k,
                  const T* next_v) {
    // With few rows, two sets of sums hide the latency of additions.
    constexpr int SETS = R <= 3 ? 2 : 1;
    Vector sums[SETS][R][2] = {};
    for (int d = 0; d < head_size; d += SETS) {
        // The next group may be in another block, where the hardware does not look.
        for (int set = 0; set < SETS; set++) {
            __builtin_prefetch(next_k + (d + set) * k_stride);
            __builtin_prefetch(next_v + (d + set) * GROUP);
        }
        for (int set = 0; set < SETS; set++) {
            Vector k0 = load(k + (d + set) * k_stride), k1 = load(k + (d + set) * k_stride + LANES);
            for (int r = 0; r < R; r++) {
                Vector factor = broadcast(q[r * head_size + d + set]);
                sums[set][r][0] += factor * k0;
                sums[set][r][1] += factor * k1;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            Vector sum = sums[0][r][half];
            if (SETS == 2) sum += sums[SETS - 1][r][half];
            store(scores + r * KEYS + half * LANES, sum);
        }
}

// out[r][d] += sum over t of weights[r][t] * v[t][d], for R rows and C vectors of columns.
template <int R, int C, class T>
INLINE void accumulate(const float* weights, const T* const* v, int num_groups, int head_size, float* out, int column) {
    Vector sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(out + r * head_size + column + c * LANES);
    for (int group = 0; group < num_groups; group++)
        for (int t = 0; t < GROUP; t++) {
            Vector row[C];
            for (int c = 0; c < C; c++) row[c] = load(v[group] + t * head_size + column + c * LANES);
            for (int r = 0; r < R; r++) {
                Vector factor = broadcast(weights[r * KEYS + group * GROUP + t]);
                for (int c = 0; c < C; c++) sums[r][c] += factor * row[c];
            }
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * head_size + column + c * LANES, sums[r][c]);
}

template <int R, class T>
INLINE void accumulate_all(const float* weights, const T* const* v, int num_groups, int head_size, float* out) {
    constexpr int WIDE = R == 1 ? 8 : R <= 3 ? 4 : 2;
    int column = 0;
    for (; column + WIDE * LANES <= head_size; column += WIDE * LANES)
        accumulate<R, WIDE, T>(weights, v, num_groups, head_size, out, column);
    for (; column < head_size; column += LANES)
        accumulate<R, 1, T>(weights, v, num_groups, head_size, out, column);
}

// Calls `run` with the number of rows as a constant.
template <class F>
INLINE void with_rows(int num_rows, F run) {
    switch (num_rows) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
        default: return run(std::integral_constant<int, TILE>());
    }
}

// Turns a row's scores into weights, and scales what the row has summed up so far to the new maximum.
INLINE void softmax_row(float* scores, int num_keys, int first_visible, int end_visible, float* maximum, float* sum,
                        float* out, int head_size) {
    for (int key = 0; key < std::min(first_visible, num_keys); key++) scores[key] = -INFINITE;
    for (int key = std::max(end_visible, 0); key < num_keys; key++) scores[key] = -INFINITE;
    Vector largest = load(scores);
    for (int key = LANES; key < num_keys; key += LANES) {
        Vector other = load(scores + key);
        largest = other > largest ? other : largest;
    }
    float now = *maximum;
    for (int lane = 0; lane < LANES; lane++) now = std::max(now, largest[lane]);
    if (now == -INFINITE) {  // the row sees none of these keys, nor any before
        std::memset(scores, 0, sizeof(float) * num_keys);
        return;
    }
    float shrink = std::exp2(*maximum - now);
    Vector sums = {};
    for (int key = 0; key < num_keys; key += LANES) {
        Vector weight = exp2_of_negative(load(scores + key) - broadcast(now));
        store(scores + key, weight);
        sums += weight;
    }
    *sum *= shrink;
    for (int lane = 0; lane < LANES; lane++) *sum += sums[lane];
    if (shrink != 1.f)
        for (int d = 0; d < head_size; d += LANES) store(out + d, load(out + d) * broadcast(shrink));
    *maximum = now;
}

struct Step {
    const float* q;
    int64_t q_stride;
    float* out;
    const int32_t* cu_query_lens;
    const int32_t* seq_lens;
    int num_heads;
    float scale;
    int window;  // 0 for none
};

template <class T>
void attend(const Step& step, const Cache& cache, const Task& task, float* buffer) {
    const int H = cache.head_size, S = cache.block_size, G = step.num_heads / cache.num_kv_heads;
    const int first_token = step.cu_query_lens[task.request];
    const int context_len = step.seq_lens[task.request] - (step.cu_query_lens[task.request + 1] - first_token);
    const int num_rows = task.num_rows;
    float *q = buffer, *out = q + ROWS * H, *scores = out + ROWS * H, *maxima = scores + ROWS * KEYS;
    float* sums = maxima + ROWS;
    auto token_of = [&](int row) { return (task.first_row + row) / G; };
    auto head_of = [&](int row) { return (int64_t)task.head * G + (task.first_row + row) % G; };

    for (int r = 0; r < num_rows; r++) {
        const float* from = step.q + (first_token + token_of(r)) * step.q_stride + head_of(r) * H;
        for (int d = 0; d < H; d++) q[r * H + d] = from[d] * (step.scale * LOG2_E);
        maxima[r] = -INFINITE;
        sums[r] = 0.f;
    }
    std::memset(out, 0, sizeof(float) * num_rows * H);

    const int end = context_len + token_of(num_rows - 1) + 1;
    const int first_seen = step.window ? std::max(0, context_len + token_of(0) + 1 - step.window) : 0;
    const int32_t* table = cache.block_tables + task.request * cache.table_stride;
    for (int first_key = first_seen / GROUP * GROUP; first_key < end; first_key += KEYS) {
        const int num_groups = std::min(GROUPS, (end - first_key + GROUP - 1) / GROUP);
        const T *k[GROUPS + 1], *v[GROUPS + 1];
        for (int group = 0; group < num_groups; group++) {
            const int position = first_key + group * GROUP;
            const int64_t head = ((int64_t)table[position / S] * cache.num_kv_heads + task.head) * H * S;
            k[group] = static_cast<const T*>(cache.keys) + head + position % S;
            v[group] = static_cast<const T*>(cache.values) + head + (int64_t)(position % S) * H;
        }
        k[num_groups] = k[num_groups - 1];
        v[num_groups] = v[num_groups - 1];
        for (int group = 0; group < num_groups; group++)
            for (int r = 0; r < num_rows; r += TILE)
                with_rows(std::min(TILE, num_rows - r), [&](auto rows) {
                    score<rows.value, T>(q + r * H, H, k[group], S, scores + r * KEYS + group * GROUP, k[group + 1],
                                         v[group + 1]);
                });
        const int num_keys = num_groups * GROUP;
        for (int r = 0; r < num_rows; r++) {
            const int position = context_len + token_of(r);
            const int first_visible = step.window ? position + 1 - step.window - first_key : 0;
            softmax_row(scores + r * KEYS, num_keys, first_visible, position + 1 - first_key, maxima + r, sums + r,
                        out + r * H, H);
        }
        for (int r = 0; r < num_rows; r += TILE)
            with_rows(std::min(TILE, num_rows - r), [&](auto rows) {
                accumulate_all<rows.value, T>(scores + r * KEYS, v, num_groups, H, out + r * H);
            });
    }
    for (int r = 0; r < num_rows; r++) {
        float* to = step.out + ((first_token + token_of(r)) * (int64_t)step.num_heads + head_of(r)) * H;
        for (int d = 0; d < H; d++) to[d] = out[r * H + d] / sums[r];
    }
}

std::vector<Task> make_tasks(const Step& step, const Cache& cache, int num_requests) {
    const int G = step.num_heads / cache.num_kv_heads;
    std::vector<Task> tasks;
    for (int request = 0; request < num_requests; request++) {
        const int query_len = step.cu_query_lens[request + 1] - step.cu_query_lens[request];
        const int context_len = step.seq_lens[request] - query_len;
        for (int row = 0; row < query_len * G; row += ROWS) {
            const int num_rows = std::min(ROWS, query_len * G - row);
            const int64_t num_keys = context_len + (row + num_rows - 1) / G + 1;
            for (int head = 0; head < cache.num_kv_heads; head++)
                tasks.push_back({request, head, row, num_rows, (num_rows + TILE) * num_keys});
        }
    }
    // The longest first, so that no thread begins one when the others are done.
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

template <class T>
void attend_all(const Step& step, const Cache& cache, int num_requests) {
    const std::vector<Task> tasks = make_tasks(step, cache, num_requests);
    std::atomic<size_t> next{0};
#pragma omp parallel num_threads(std::min<int>(omp_get_max_threads(), tasks.size()))
    {
        std::vector<float> buffer(ROWS * (2 * cache.head_size + KEYS + 2));
        for (size_t task; (task = next.fetch_add(1)) < tasks.size();) attend<T>(step, cache, tasks[task], buffer.data());
    }
}

template <class T>
void write_all(const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* keys, T* values, const int64_t* slots,
               int64_t num_tokens, const int64_t* new_blocks, int64_t num_new_blocks, int num_kv_heads, int H, int S) {
    const int64_t block_elements = (int64_t)num_kv_heads * H * S;
#pragma omp parallel if (num_tokens * num_kv_heads * H > 1 << 15)
    {
#pragma omp for
        for (int64_t index = 0; index < num_new_blocks; index++) {
            std::memset(keys + new_blocks[index] * block_elements, 0, sizeof(T) * block_elements);
            std::memset(values + new_blocks[index] * block_elements, 0, sizeof(T) * block_elements);
        }
#pragma omp for
        for (int64_t token = 0; token < num_tokens; token++) {
            const int64_t block = slots[token] / S * block_elements, offset = slots[token] % S;
            for (int head = 0; head < num_kv_heads; head++) {
                T* to = keys + block + (int64_t)head * H * S + offset;
                for (int d = 0; d < H; d++) to[(int64_t)d * S] = k[token * k_stride + head * H + d];
                std::memcpy(values + block + (head * S + offset) * H, v + token * v_stride + head * H, sizeof(T) * H);
            }
        }
    }
}

}  // namespace

extern "C" {

// q is [T, N, H] and out [T, N, H] float32, the former with q_stride elements between tokens. The pools hold float32 or
// bfloat16. cu_query_lens is [R + 1], seq_lens [R], window 0 for none.
void sarathi_attention(const float* q, int64_t q_stride, const void* keys, const void* values, int is_bfloat16,
                       float* out, const int32_t* cu_query_lens, const int32_t* seq_lens, const int32_t* block_tables,
                       int64_t table_stride, int num_requests, int num_heads, int num_kv_heads, int head_size,
                       int block_size, float scale, int window) {
    const Step step = {q, q_stride, out, cu_query_lens, seq_lens, num_heads, scale, window};
    const Cache cache = {keys, values, block_tables, table_stride, num_kv_heads, head_size, block_size};
    if (is_bfloat16)
        attend_all<bfloat16>(step, cache, num_requests);
    else
        attend_all<float>(step, cache, num_requests);
}

// k and v are [T, K, H] with k_stride and v_stride elements between tokens, of the pools' type.
void sarathi_write_kv(const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
                      int is_bfloat16, const int64_t* slots, int64_t num_tokens, const int64_t* new_blocks,
                      int64_t num_new_blocks, int num_kv_heads, int head_size, int block_size) {
    auto write = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        write_all<T>(static_cast<const T*>(k), k_stride, static_cast<const T*>(v), v_stride, static_cast<T*>(keys),
                     static_cast<T*>(values), slots, num_tokens, new_blocks, num_new_blocks, num_kv_heads, head_size,
                     block_size);
    };
    if (is_bfloat16)
        write(static_cast<bfloat16*>(nullptr));
    else
        write(static_cast<float*>(nullptr));
}
}
